"""The base as a checkpoint of bitsandbytes' 4-bit weights (finebits.layouts.bnb), in `base/`, under a PEFT adapter: what `load_in_4bit` saves,
read by transformers, bitsandbytes and peft.

NF4 and FP4 (variant bnb) in blocks that do not cross rows; linear layers that the plan leaves dense are left so, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.export import _peft as peft
from finebits.export._safetensors import coded_entries, quantized
from finebits.export.base import Extras, File, Layers, Read, Weights, sample, try_each
from finebits.layouts.bnb import STATE, to_bnb
from finebits.linears import own_class
from finebits.qtensor import QTensor
from finebits.store import plan_of
from finebits.tasks import base as tasks


@dataclass(frozen=True)
class BitsAndBytes:
    """Params4bit under an adapter.

    >>> BitsAndBytes().check({"up_proj": (fb.NF(4, 64), (256, 128))}, torch.bfloat16)  # it holds that as it is
    """

    rounds: ClassVar[float] = 0.0
    scales: ClassVar[str | None] = "fp32"
    layers: ClassVar[Layers] = "Linear"

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        try_each(weights, dtype, code)

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        for name in quantized(model)[0]:
            if (kind := own_class(model.get_submodule(name))) != "Linear":
                raise Invalid(
                    f"transformers makes bitsandbytes' layers of nn.Linear alone, and {name} is a {kind}: export adapter or merged"
                )
        return peft.over(model, coded_entries(model, getattr(torch, plan_of(model).levers.dtype), code))

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        coded, dense = quantized(model)
        kinds = {key.rpartition("__")[2] for W in coded.values() for key in code(sample(W.format, tuple(W.shape), W.dtype)) if STATE in key}
        quantization: dict[str, Any] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "fp4" if kinds == {"fp4"} else "nf4",  # of a weight that says nothing itself: there is none
            "bnb_4bit_compute_dtype": plan_of(model).levers.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_skip_modules": dense,
        }
        about = peft.about("which bitsandbytes holds in 4 bits", f'{tasks.of(model).auto}.from_pretrained(f"{{folder}}/base")')
        peft.describe(model, folder, place, extras, *about, quantization=quantization if coded else None)

    def read(self, folder: Path) -> Read:
        try:
            from bitsandbytes import __version__
        except ImportError:
            return Read("finebits (bitsandbytes is not installed)", peft.base_of(folder))
        return Read(f"transformers, bitsandbytes {__version__}, peft", peft.base_of(folder), plain)


def code(q: QTensor) -> dict[str, Tensor]:
    """Nested state where bitsandbytes groups scales as we do, else plain float32 absmax: the same values.

    >>> sorted(name for name in code(fb.quantize(torch.eye(2, 64), fb.NF(4, 64, scale="fp16"))) if "absmax" in name)
    ['weight.absmax']
    """
    try:
        return to_bnb(q)
    except Invalid:
        return to_bnb(q, expand=True)


def plain(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight that bitsandbytes finds in its parts."""
    from bitsandbytes import functional

    state = functional.QuantState.from_dict(
        {k.removeprefix("weight."): v for k, v in parts.items() if k != "weight"}, device=torch.device("cpu")
    )
    return functional.dequantize_4bit(parts["weight"], state)
