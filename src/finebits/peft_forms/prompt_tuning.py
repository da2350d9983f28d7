"""Prompt tuning (PEFT: PromptTuningConfig): P as prompt_embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.adapters import prompt_tuning as paper
from finebits.adapters.base import Params
from finebits.peft_forms._prompts import NAME, OfNetwork, of_network
from finebits.peft_forms.base import Held, Written


@dataclass(frozen=True)
class PromptTuning(OfNetwork):
    """Embeddings before those of every row.

    >>> PromptTuning().write({"model": Held(fb.PromptTuning(tokens=2), {"prompt": torch.ones(2, 3)})}).settings
    {'num_virtual_tokens': 2}
    """

    peft: ClassVar[str] = "PROMPT_TUNING"
    adapter: ClassVar[type] = paper.PromptTuning

    def write(self, held: Mapping[str, Held]) -> Written:
        ((adapter, p, _),) = held.values()
        return Written({"num_virtual_tokens": adapter.tokens}, {}, {NAME: p["prompt"]})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        ((network, (_, n)),) = shapes.items()
        tokens, prompt = of_network(settings, common, n)
        return {network: Held(paper.PromptTuning(tokens), {"prompt": prompt})}
