"""P-tuning (PEFT: PromptEncoderConfig): what the encoder has made, as prompt_embeddings; PEFT saves no encoder.

So it comes back as prompt tuning, which it is once it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.adapters import p_tuning as paper
from finebits.adapters.base import Params
from finebits.adapters.prompt_tuning import PromptTuning
from finebits.peft_forms._prompts import NAME, OfNetwork, of_network
from finebits.peft_forms.base import Held, Written


@dataclass(frozen=True)
class PTuning(OfNetwork):
    """Embeddings before those of every row, which an encoder made.

    >>> p = {k: torch.ones(shape) for k, shape in fb.PTuning(tokens=2, hidden=3).shapes(9, 4).items()}
    >>> tuple(PTuning().write({"model": Held(fb.PTuning(tokens=2, hidden=3), p)}).common["prompt_embeddings"].shape)
    (2, 4)
    """

    peft: ClassVar[str] = "P_TUNING"
    adapter: ClassVar[type] = paper.PTuning

    def write(self, held: Mapping[str, Held]) -> Written:
        ((adapter, p, _),) = held.values()
        settings = {"num_virtual_tokens": adapter.tokens, "encoder_hidden_size": adapter.hidden}
        settings["encoder_reparameterization_type"] = adapter.encoder.upper()
        return Written(settings, {}, {NAME: adapter.encoded(p)})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        ((network, (_, n)),) = shapes.items()
        tokens, prompt = of_network(settings, common, n)
        return {network: Held(PromptTuning(tokens), {"prompt": prompt})}
