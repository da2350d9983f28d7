"""compressed-tensors' format "pack-quantized", INT2, INT3, INT4 and INT8, to the bit: what llm-compressor writes <-> QTensor. vLLM reads 4 and 8
bits of it.

    weight_packed       int32 (m, ⌈n·b/32⌉), q + 2^(b−1), the first column in the lowest bits
    weight_scale        (m, k), in the dtype of the model
    weight_zero_point   int32 (⌈m·b/32⌉, k), z + 2^(b−1) packed along the rows, if not symmetric
    weight_shape        (m, n)

    ŵ = s·q  or  s·(q − z),  q ∈ {−2^(b−1) … 2^(b−1) − 1}

Codes, scales and zero points are kept bit by bit. Values are equal too for 16-bit scales; with float32 scales and a zero point they can
differ in the last place, where s·q − s·z is rounded once more than s·(q − z).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats.base import STORES
from finebits.formats.int import Int
from finebits.layouts._words import from_words, mapped, to_words
from finebits.qtensor import QTensor

BITS = (2, 3, 4, 8)


def weights_scheme(format: Any) -> dict[str, Any]:
    """The "weights" entry of a quantization_config group for this format. Raises ValueError where there is none.

    >>> weights_scheme(fb.Int(4, 128))
    {'num_bits': 4, 'type': 'int', 'symmetric': True, 'strategy': 'group', 'group_size': 128}
    """
    if not isinstance(format, Int) or format.bits not in BITS:
        raise Invalid(f"pack-quantized holds Int(2), Int(3), Int(4) and Int(8) here; this weight is {format}")
    if format.form == "real":
        raise Invalid("pack-quantized has integer zero points; this weight has real minima: quantize with variant='integer'")
    if format.unit is not None or format.block == "tensor" or not isinstance(format.scale, str):
        raise Invalid(f"pack-quantized has plain scales, one a group or a row; this weight is {format}")
    rest = {"strategy": "channel"} if format.block == "row" else {"strategy": "group", "group_size": format.block}
    return {"num_bits": format.bits, "type": "int", "symmetric": format.symmetric, **rest}


def to_compressed(q: QTensor) -> dict[str, Tensor]:
    """The tensors of one module, by compressed-tensors' names.

    >>> {name: tuple(t.shape) for name, t in to_compressed(fb.quantize(torch.eye(2, 64), fb.Int(4, 32))).items()}  # eight codes a word
    {'weight_packed': (2, 8), 'weight_scale': (2, 2), 'weight_shape': (2,)}
    """
    scheme = weights_scheme(q.format)
    m, n = _matrix(q)
    if n % scheme.get("group_size", 1):
        raise Invalid(f"pack-quantized has whole groups; {scheme['group_size']} does not divide rows of {n}")
    bits, half, symmetric = q.format.bits, 2 ** (q.format.bits - 1), scheme["symmetric"]
    unsigned = q.codes()
    if symmetric:
        unsigned = mapped(torch.tensor(q.format.levels(), device=q.device).add(half).to(torch.uint8), unsigned)
    out = {"weight_packed": to_words(unsigned, bits), "weight_scale": q.parts["scale"], "weight_shape": torch.tensor([m, n])}
    if not symmetric:
        out["weight_zero_point"] = to_words(q.parts["zero"].T, bits).T.contiguous()
    return out


def from_compressed(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype | None = None) -> QTensor:
    """The weight of one module; `scheme` is the "weights" entry of its group. `dtype` is that of the scales unless another is asked for.

    >>> q = fb.quantize(torch.eye(2, 64), fb.Int(4, 32))
    >>> torch.equal(from_compressed(to_compressed(q), weights_scheme(q.format)).dequantize(), q.dequantize())
    True
    """
    bits, strategy, scale = scheme["num_bits"], scheme.get("strategy"), tensors["weight_scale"]
    stores = {v: k for k, v in STORES.items()}
    if bits not in BITS or scheme.get("type", "int") != "int" or strategy not in ("group", "channel") or scale.dtype not in stores:
        raise Invalid(
            f"pack-quantized is read with int weights of 2, 3, 4 or 8 bits by group or channel; this is {dict(scheme)}, {scale.dtype}"
        )
    if "weight_g_idx" in tensors and (tensors["weight_g_idx"].diff() < 0).any():
        raise Invalid("this weight has groups in activation order; here groups are neighbouring columns: dequantize it and quantize again")
    m, n = tensors["weight_shape"].tolist()
    symmetric = bool(scheme.get("symmetric", True))
    block = "row" if strategy == "channel" else int(scheme["group_size"])
    format = Int(bits, block, symmetric, stores[scale.dtype], "full" if symmetric else "integer")
    parts = {"scale": scale.clone()}
    if not symmetric:
        parts["zero"] = from_words(tensors["weight_zero_point"].T.contiguous(), bits, m).T.contiguous()
    return QTensor.from_codes(from_words(tensors["weight_packed"], bits, n), parts, format, dtype or scale.dtype)


def _matrix(q: QTensor) -> tuple[int, int]:
    if q.ndim != 2:
        raise Invalid(f"this layout holds matrices; the weight is {tuple(q.shape)}: write one expert after the other")
    return q.shape[0], q.shape[1]
