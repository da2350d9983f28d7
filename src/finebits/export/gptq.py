"""The base as a GPTQ checkpoint (finebits.layouts.gptq), in `base/`, under a PEFT adapter: the layout of AutoGPTQ and GPTQModel, which
vLLM reads as well.

Integers of 2, 3, 4 and 8 bits with float16 scales. The commonest format of the plan is the checkpoint's own; other formats, and layers that stay
dense, are exceptions by name (GPTQModel's `dynamic`). Zero points are held as "gptq" does where it has them all, else as "gptq_v2".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.export import _peft as peft
from finebits.export._safetensors import coded_entries, quantized
from finebits.export.base import Extras, File, Layers, Read, Weights, try_each
from finebits.layouts.gptq import to_gptq
from finebits.qtensor import QTensor
from finebits.store import plan_of
from finebits.tasks import base as tasks

Scheme = tuple[int, int, bool]  # bits, columns of a group (-1 for all), symmetric?


@dataclass(frozen=True)
class GPTQ:
    """Integers in words under an adapter.

    >>> GPTQ().check({"up_proj": (fb.Int(4, 128, scale="fp16"), (256, 128))}, torch.bfloat16)  # it holds that as it is
    """

    rounds: ClassVar[float] = 0.0
    scales: ClassVar[str | None] = "fp16"
    layers: ClassVar[Layers] = "linears"

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        try_each(weights, dtype, lambda q: to_gptq(q, "gptq_v2"))

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        layout = layout_of(model)
        return peft.over(model, coded_entries(model, getattr(torch, plan_of(model).levers.dtype), lambda q: to_gptq(q, layout), "fp16"))

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        coded, dense = quantized(model)
        about = peft.about("which a GPTQ checkpoint packs into integers", f'{tasks.of(model).auto}.from_pretrained(f"{{folder}}/base")')
        peft.describe(
            model, folder, place, extras, *about, quantization=quantization_config(coded, dense, layout_of(model)) if coded else None
        )

    def read(self, folder: Path) -> Read:
        return Read("finebits (GPTQ has no reader of single weights)", peft.base_of(folder))


def layout_of(model: nn.Module) -> str:
    """The older of the two layouts that holds every zero point."""
    for W in quantized(model)[0].values():
        try:
            if not getattr(W.format, "symmetric", True):
                to_gptq(W)
        except Invalid:
            return "gptq_v2"
    return "gptq"


def quantization_config(coded: dict[str, QTensor], dense: list[str], layout: str) -> dict[str, Any]:
    """quantization_config."""
    schemes = {name: scheme(W) for name, W in coded.items()}
    (bits, group, symmetric), _ = Counter(schemes.values()).most_common(1)[0]
    exact = lambda name: f"^{re.escape(name)}$"  # noqa: E731
    others = {name: s for name, s in schemes.items() if s != (bits, group, symmetric)}
    dynamic: dict[str, Any] = {f"-:{exact(name)}": {} for name in dense}
    dynamic |= {f"+:{exact(name)}": {"bits": b, "group_size": g, "sym": s} for name, (b, g, s) in others.items()}
    return {
        "quant_method": "gptq",
        "checkpoint_format": layout,
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": "lm_head" in coded,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def scheme(W: Tensor) -> Scheme:
    format: Any = cast(QTensor, W).format
    return format.bits, -1 if format.block == "row" else int(format.block), format.symmetric
