"""One model in Hugging Face form without adapters: base plus update, summed in float32 and rounded once to bfloat16; read by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from finebits.export._card import FINETUNE, card
from finebits.export._safetensors import describe_model, merged_entries, model_files, parted
from finebits.export.base import Extras, File, Layers, Read, Weights
from finebits.files import write_text
from finebits.store import plan_of
from finebits.tasks import base as tasks

ABOUT = (
    "The quantized weights and the adapter trained over them, summed in float32 and rounded once to the dtype of the files."
    "\n\n```python\nmodel = {auto}.from_pretrained(folder)\n```"
)


@dataclass(frozen=True)
class Merged:
    """The update in the weights.

    >>> Merged().rounds  # to bfloat16, once: so many nats a token
    0.01
    """

    rounds: ClassVar[float] = 1e-2
    scales: ClassVar[str | None] = None
    layers: ClassVar[Layers] = "all"

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        """Every weight has a dense form."""

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        return model_files(merged_entries(model, _dtype(model)))

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        task = tasks.of(model)
        describe_model(model, folder, _dtype(model), extras.tokenizer, apart=parted(model))
        write_text(folder / "README.md", card(plan_of(model), FINETUNE, ABOUT.format(auto=task.auto), place.name, extras, task.pipeline))

    def read(self, folder: Path) -> Read:
        return Read("transformers", folder)


def _dtype(model: nn.Module) -> torch.dtype:
    """bfloat16, but for a model whose float32 weights were trained themselves: most of what a few small steps change is below its grid."""
    plan = plan_of(model)
    full = any(spec.adapter is not None and spec.adapter.itself for spec in plan.modules.values())
    return torch.float32 if full and plan.levers.dtype == "float32" else torch.bfloat16
