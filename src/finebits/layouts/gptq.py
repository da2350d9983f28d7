"""The GPTQ checkpoint layout, to the bit: what AutoGPTQ and GPTQModel write and most servers read <-> QTensor.

    qweight   int32 (n·b/32, m), packed along the inputs, the first input in the lowest bits
    qzeros    int32 (k, m·b/32), packed along the outputs; "gptq" holds z − 1, "gptq_v2" holds z
    scales    float16 (k, m)
    g_idx     int32 (n,), the group of every input

    ŵ = s·(q − z),  q ∈ {0 … 2^b − 1}

A symmetric weight has z = 2^(b−1) everywhere. Groups in activation order (a g_idx that is not j // group) are refused: here a group is
a run of neighbouring columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats.int import Int
from finebits.layouts._words import exactly, from_words, mapped, to_words
from finebits.qtensor import QTensor

BITS = (2, 3, 4, 8)


def to_gptq(q: QTensor, layout: str = "gptq") -> dict[str, Tensor]:
    """The four tensors of one module. Raises ValueError where the layout cannot hold the weight as it is.

    >>> {name: tuple(t.shape) for name, t in to_gptq(fb.quantize(torch.eye(8, 64), fb.Int(4, 32, scale="fp16"))).items()}
    {'qweight': (8, 8), 'qzeros': (2, 1), 'scales': (2, 8), 'g_idx': (64,)}
    """
    format, minus = q.format, _minus(layout)
    if (
        not isinstance(format, Int)
        or format.bits not in BITS
        or format.form == "real"
        or format.unit is not None
        or format.block == "tensor"
    ):
        raise Invalid(
            f"GPTQ holds integers of 2, 3, 4 or 8 bits, symmetric or with an integer zero point, in groups; this weight is {format}"
        )
    if q.ndim != 2:
        raise Invalid(f"GPTQ holds matrices; the weight is {tuple(q.shape)}: write one expert after the other")
    bits, (m, n) = format.bits, q.shape
    group = n if format.block == "row" else int(format.block)
    per = 32 // math.gcd(bits, 32)  # codes that fill whole words
    if n % group or n % per or m % per:
        raise Invalid(f"GPTQ packs whole groups and whole words of {per} codes; this weight is {m} × {n} in groups of {group}")
    scale = exactly(format.scales(q.parts, n).scale, torch.float16, "the scale")
    codes, half = q.codes(), 2 ** (bits - 1)
    if format.symmetric:
        codes = mapped(torch.tensor(format.levels(), device=q.device).add(half).to(torch.uint8), codes)
    zero = torch.full_like(scale, half, dtype=torch.long) if format.symmetric else q.parts["zero"].long()
    stored_zero = zero - minus
    if stored_zero.min() < 0 or stored_zero.max() >= 2**bits:
        span, other = f"{int(zero.min())} to {int(zero.max())}", "gptq_v2" if minus else "gptq"
        raise Invalid(f"layout {layout!r} holds zero points {minus} to {2**bits - 1 + minus}, and this weight has {span}: use {other!r}")
    return {
        "qweight": to_words(codes, bits).T.contiguous(),
        "qzeros": to_words(stored_zero.T.to(torch.uint8), bits),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(n, device=q.device) // group).int(),
    }


def from_gptq(tensors: Mapping[str, Tensor], bits: int, sym: bool, layout: str = "gptq", dtype: torch.dtype = torch.float16) -> QTensor:
    """The weight of one module; bits, sym and layout ("checkpoint_format") are in the checkpoint's quantization_config.

    >>> q = fb.quantize(torch.eye(8, 64), fb.Int(4, 32, scale="fp16"))
    >>> torch.equal(from_gptq(to_gptq(q), bits=4, sym=True, dtype=torch.float32).dequantize(), q.dequantize())
    True
    """
    minus = _minus(layout)
    if bits not in BITS:
        raise Invalid(f"GPTQ layouts of {', '.join(map(str, BITS))} bits are read, not of {bits}")
    scale = exactly(tensors["scales"].T.contiguous(), torch.float16, "the scale")
    m, k = scale.shape
    n = tensors["qweight"].shape[0] * 32 // bits
    group = n // k
    order = tensors.get("g_idx")  # which groups in order may lack
    if n % k or order is not None and not torch.equal(order.long().cpu(), torch.arange(n) // group):
        raise Invalid("this weight has groups in activation order; here groups are neighbouring columns: dequantize it and quantize again")
    zero = (from_words(tensors["qzeros"], bits, m) + minus).T.contiguous()
    codes = from_words(tensors["qweight"].T.contiguous(), bits, n)
    block = "row" if k == 1 else group
    if sym:
        if (zero != 2 ** (bits - 1)).any():
            raise Invalid(
                f"a symmetric GPTQ weight has zero points {2 ** (bits - 1)}, and this one has others: is layout {layout!r} right?"
            )
        return QTensor.from_codes(codes, {"scale": scale}, Int(bits, block, True, "fp16", "full"), dtype)
    return QTensor.from_codes(codes, {"scale": scale, "zero": zero}, Int(bits, block, False, "fp16", "integer"), dtype)


def _minus(layout: str) -> int:
    if layout not in ("gptq", "gptq_v2"):
        raise Invalid(f"layout is {layout!r}; it can be 'gptq' or 'gptq_v2'")
    return 1 if layout == "gptq" else 0
