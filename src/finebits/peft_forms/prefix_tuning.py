"""Prefix tuning (PEFT: PrefixTuningConfig): keys and values of every layer as prompt_embeddings; PEFT saves no projection.

So a prefix that was trained through hidden units is written, and comes back, as what these have made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.adapters import prefix_tuning as paper
from finebits.adapters.base import Params
from finebits.peft_forms._prompts import NAME, OfNetwork, of_network
from finebits.peft_forms.base import Held, Written


@dataclass(frozen=True)
class PrefixTuning(OfNetwork):
    """Keys and values before those of every row, in every layer.

    >>> PrefixTuning().write({"model": Held(fb.PrefixTuning(tokens=2), {"prefix": torch.ones(2, 8)})}).settings
    {'num_virtual_tokens': 2}
    """

    peft: ClassVar[str] = "PREFIX_TUNING"
    adapter: ClassVar[type] = paper.PrefixTuning

    def write(self, held: Mapping[str, Held]) -> Written:
        ((adapter, p, _),) = held.values()
        return Written({"num_virtual_tokens": adapter.tokens}, {}, {NAME: adapter.prefix(p)})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        ((network, (m, _)),) = shapes.items()
        tokens, prefix = of_network(settings, common, 2 * m)
        return {network: Held(paper.PrefixTuning(tokens), {"prefix": prefix})}
