"""A PEFT adapter at the root of the folder and, in `base/`, the dense model that it belongs to: any plan, read by transformers and peft.

The base is in the plan's dtype, so that it holds exactly what training multiplied with; where an adapter rescales it, in float32,
for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from finebits.export import _peft as peft
from finebits.export._fold import folded, rounds
from finebits.export._safetensors import base_entries
from finebits.export.base import Extras, File, Layers, Read, Weights
from finebits.store import plan_of
from finebits.tasks import base as tasks


@dataclass(frozen=True)
class Adapter:
    """The base dense, the update beside it.

    >>> Adapter().check({"up_proj": (fb.NF(3), (256, 128))}, torch.bfloat16)  # it holds all that there is
    """

    rounds: ClassVar[float] = 0.0
    scales: ClassVar[str | None] = None
    layers: ClassVar[Layers] = "all"

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        """Every weight has a dense form."""

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        peft.portable(model)  # refuses a model without an adapter
        return peft.over(model, base_entries(model, self._dtype(model), folded(model)), packed=False)

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        about = peft.about(
            "the dense form of the quantized weights it was trained over", f'{tasks.of(model).auto}.from_pretrained(f"{{folder}}/base")'
        )
        peft.describe(model, folder, place, extras, *about, dtype=self._dtype(model))

    def _dtype(self, model: nn.Module) -> torch.dtype:
        """The plan's; float32 where adapters rescale weights, which 16 bits would round once more."""
        return torch.float32 if rounds(model, None) else getattr(torch, plan_of(model).levers.dtype)

    def read(self, folder: Path) -> Read:
        return Read("transformers, peft", peft.base_of(folder))
