"""The base as a checkpoint of compressed-tensors, format pack-quantized (finebits.layouts.compressed_tensors), in `base/`, under a PEFT adapter:
what llm-compressor writes, read by transformers with compressed-tensors, and by vLLM.

Integers of 2, 3, 4 and 8 bits, vLLM reads 4 and 8; every format of the plan is a config group that names its modules. Scales are read in
the dtype of the model, so they must be numbers of it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.export import _peft as peft
from finebits.export._fold import held_in
from finebits.export._safetensors import coded_entries, quantized
from finebits.export.base import Extras, File, Layers, Read, Weights, try_each
from finebits.layouts._words import exactly
from finebits.layouts.compressed_tensors import to_compressed, weights_scheme
from finebits.qtensor import QTensor
from finebits.store import plan_of
from finebits.tasks import base as tasks


@dataclass(frozen=True)
class CompressedTensors:
    """Packed integers under an adapter.

    >>> CompressedTensors().check({"up_proj": (fb.Int(4, 128, scale="bf16"), (256, 128))}, torch.bfloat16)  # it holds that as it is
    """

    rounds: ClassVar[float] = 0.0
    scales: ClassVar[str | None] = "model"
    layers: ClassVar[Layers] = "linears"

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        try_each(weights, dtype, code)
        _groups([format for format, _ in weights.values() if format is not None])

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        dtype = getattr(torch, plan_of(model).levers.dtype)
        base = coded_entries(model, dtype, code, held_in(self.scales, dtype) or "fp32")
        _groups([W.format for W in quantized(model)[0].values()])
        return peft.over(model, base)

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        coded, dense = quantized(model)
        schemes: dict[str, list[str]] = {}
        for name, W in coded.items():
            schemes.setdefault(json.dumps(weights_scheme(W.format)), []).append(name)
        quantization: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {"targets": names, "weights": json.loads(scheme)} for i, (scheme, names) in enumerate(schemes.items())
            },
            "ignore": dense,
        }
        dequantize = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if len(schemes) == 1 else ""
        after = "" if dequantize else "\nbase.hf_quantizer.compressor.decompress_model(base)"
        about = peft.about(
            "which compressed-tensors packs into integers",
            f'{tasks.of(model).auto}.from_pretrained(f"{{folder}}/base"{dequantize}){after}',
        )
        peft.describe(model, folder, place, extras, *about, quantization=quantization if coded else None)

    def read(self, folder: Path) -> Read:
        base = peft.base_of(folder)
        try:
            from compressed_tensors import __version__
        except ImportError:
            return Read("finebits (compressed-tensors is not installed)", base)
        groups = json.loads((base / "config.json").read_text(encoding="utf-8")).get("quantization_config", {}).get("config_groups", {})
        of = {name: group["weights"] for group in groups.values() for name in group["targets"]}
        return Read(
            f"transformers, compressed-tensors {__version__}, peft",
            base,
            lambda name, parts: plain(of[name.removesuffix(".weight")], parts),
            load=lambda dtype: decompressed(base, len(groups), dtype),
        )


def _groups(formats: Sequence[Any]) -> None:
    """Raise ValueError for zero points in a plan of several formats: transformers dequantizes a checkpoint of one format, of several it takes
    symmetric ones alone."""
    if len({json.dumps(weights_scheme(f)) for f in formats}) > 1 and (odd := next((f for f in formats if not f.symmetric), None)):
        raise Invalid(f"transformers reads zero points of compressed-tensors where all matrices have one format; {odd} is not alone here")


def decompressed(base: Path, groups: int, dtype: torch.dtype) -> Any:
    """The base with plain weights, over which peft lays adapters."""
    import transformers
    from transformers import AutoConfig, CompressedTensorsConfig

    kind = getattr(transformers, tasks.of(AutoConfig.from_pretrained(base)).auto)
    if groups == 1:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")  # of a key that is there for just that
            return kind.from_pretrained(base, dtype=dtype, quantization_config=CompressedTensorsConfig(dequantize=True))
    model = kind.from_pretrained(base, dtype=dtype)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.compressor.decompress_model(model)
    return model


def code(q: QTensor) -> dict[str, Tensor]:
    """Scales in the dtype of the model, which are what its readers make of them. Raises ValueError where that would round them.

    >>> code(fb.quantize(torch.eye(2, 64), fb.Int(4, 32)))["weight_scale"].dtype
    torch.float32
    """
    parts, scale = to_compressed(q), q.parts["scale"]
    try:
        return parts | {"weight_scale": exactly(scale, q.dtype, "the scale")}
    except Invalid:
        dtype = str(q.dtype).removeprefix("torch.")
        raise Invalid(
            f"compressed-tensors has scales in the dtype of the model, {dtype}, and those of {q.format} would be rounded: quantize with a "
            f"scale of bf16 for a bfloat16 model"
        ) from None


def plain(scheme: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    """The weight that compressed-tensors finds in its parts."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    full_scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme))
    return PackedQuantizationCompressor.decompress(dict(parts), full_scheme)["weight"]
