"""The adapter in PEFT's own form (rsLoRA as rsLoRA, AdaLoRA as AdaLoRA, …) at the root of the folder and, in `base/`, the dense model that it
belongs to: for going on with it in peft, and for what is no plain LoRA.

Where PEFT has no method that is the same, `adapter` writes a plain LoRA if the update is low-rank, and `merged` the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from finebits.export import _peft as folder_of
from finebits.export._safetensors import base_entries
from finebits.export.base import Extras, File, Layers, Read, Weights
from finebits.peft_forms.base import held
from finebits.store import plan_of
from finebits.tasks import base as tasks


@dataclass(frozen=True)
class Peft:
    """The base dense, the adapter as it is.

    >>> Peft().check({"up_proj": (fb.NF(3), (256, 128))}, torch.bfloat16)  # it holds all that there is
    """

    rounds: ClassVar[float] = 0.0
    layers: ClassVar[Layers] = "all"
    scales: ClassVar[str | None] = None

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        """Every weight has a dense form."""

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        held(model)  # refuses a model without an adapter, and one that peft has no method for
        return folder_of.over(model, base_entries(model, getattr(torch, plan_of(model).levers.dtype)), packed=False, own=True)

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        about = folder_of.about(
            "the dense form of the quantized weights it was trained over", f'{tasks.of(model).auto}.from_pretrained(f"{{folder}}/base")'
        )
        folder_of.describe(model, folder, place, extras, *about, own=True)

    def read(self, folder: Path) -> Read:
        return Read("transformers, peft", folder_of.base_of(folder))
