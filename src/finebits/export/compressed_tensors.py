"""The base as a checkpoint of compressed-tensors, format pack-quantized (finebits.layouts.compressed_tensors), in `base/`, under a PEFT adapter:
what llm-compressor writes, read by transformers with compressed-tensors, and by vLLM.

Integers of 4 and 8 bits; every format of the plan is a config group that names its modules. Scales are read in the dtype of the model, so
they must be numbers of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.export import _peft as peft
from finebits.export._safetensors import coded_entries, quantized
from finebits.export.base import File, Read, Told, sample
from finebits.layouts._words import exactly
from finebits.layouts.compressed_tensors import to_compressed, weights_scheme
from finebits.qtensor import QTensor
from finebits.store import plan_of


@dataclass(frozen=True)
class CompressedTensors:
    """Packed integers under an adapter."""

    rounds: ClassVar[bool] = False

    def check(self, format: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        if format is not None:
            code(sample(format, shape, dtype or torch.float32))

    def files(self, model: nn.Module, told: Told) -> dict[str, File]:
        return peft.over(model, coded_entries(model, getattr(torch, plan_of(model).levers["dtype"]), code))

    def describe(self, model: nn.Module, folder: Path, place: Path, told: Told) -> None:
        coded, dense = quantized(model)
        schemes: dict[str, list[str]] = {}
        for name, W in coded.items():
            schemes.setdefault(json.dumps(weights_scheme(W.format)), []).append(name)
        said: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {"targets": names, "weights": json.loads(scheme)} for i, (scheme, names) in enumerate(schemes.items())
            },
            "ignore": dense,
        }
        about = peft.about("which compressed-tensors packs into integers", 'AutoModelForCausalLM.from_pretrained(f"{folder}/base")')
        peft.describe(model, folder, place, told, *about, quantization=said if coded else None)

    def read(self, folder: Path) -> Read:
        base = peft.base_of(folder)
        try:
            from compressed_tensors import __version__
        except ImportError:
            return Read("finebits (compressed-tensors is not installed)", base)
        groups = json.loads((base / "config.json").read_text()).get("quantization_config", {}).get("config_groups", {})
        of = {name: group["weights"] for group in groups.values() for name in group["targets"]}
        return Read(
            f"transformers, compressed-tensors {__version__}, peft",
            base,
            lambda name, parts: plain(of[name.removesuffix(".weight")], parts),
        )


def code(q: QTensor) -> dict[str, Tensor]:
    """Scales in the dtype of the model, which are what its readers make of them. Raises ValueError where that would round them."""
    made, scale = to_compressed(q), q.parts["scale"]
    try:
        return made | {"weight_scale": exactly(scale, q.dtype, "the scale")}
    except Invalid:
        held = str(q.dtype).removeprefix("torch.")
        raise Invalid(
            f"compressed-tensors has scales in the dtype of the model, {held}, and those of {q.format} would be rounded: quantize with a "
            f"scale of bf16 for a bfloat16 model"
        ) from None


def plain(scheme: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    """The weight that compressed-tensors finds in its parts."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    whole = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme))
    return PackedQuantizationCompressor.decompress(dict(parts), whole)["weight"]
