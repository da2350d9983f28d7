"""The base in the codes that it was trained over (finebits.layouts.packed), in `base/`, under a PEFT adapter: what transformers and
peft load once finebits is imported.

Every format, and tables of embeddings as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finebits.build import weighted
from finebits.export import _peft as peft
from finebits.export._safetensors import coded_entries
from finebits.export.base import Extras, File, Layers, Read, Weights
from finebits.layouts.packed import METHOD, groups_of
from finebits.qtensor import QTensor, parts_of
from finebits.served import served
from finebits.store import plan_of
from finebits.tasks import base as tasks


@dataclass(frozen=True)
class Packed:
    """QTensors under an adapter.

    >>> Packed().check({"up_proj": (fb.NF(3), (256, 128))}, torch.bfloat16)  # it holds any format as it is
    """

    rounds: ClassVar[float] = 0.0
    scales: ClassVar[str | None] = "fp32"
    layers: ClassVar[Layers] = "linears"

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        pass

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        return peft.over(model, coded_entries(model, getattr(torch, plan_of(model).levers.dtype), code, tables=True))

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        of = {name: served(host) for name, host in weighted(model).items()}
        held = {name: (W.format, W.shape) for name, W in of.items() if isinstance(W, QTensor)}
        quantization = {"quant_method": METHOD, "groups": groups_of(held)}
        load = f'{tasks.of(model).auto}.from_pretrained(f"{{folder}}/base")  # after import finebits'
        about = peft.about("which finebits holds in few bits", load)
        peft.describe(model, folder, place, extras, *about, quantization=quantization if held else None)

    def read(self, folder: Path) -> Read:
        return Read("transformers, finebits, peft", peft.base_of(folder))


def code(q: QTensor) -> dict[str, Tensor]:
    """The parts as they are.

    >>> list(code(fb.quantize(torch.eye(2, 64), fb.NF(4))))
    ['weight.codes', 'weight.scale']
    """
    return parts_of("weight", q)
