"""GGUF's plain integer blocks, to the bit: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 <-> QTensor; and a dense weight rounded into any type.

Rows are blocks of 32 weights; in a block come the float16 scale d, in Q4_1 and Q5_1 the float16 minimum m, then the codes:

    Q4_0   d·(q − 8)     weight j in the low nibble of byte j, weight j + 16 in its high nibble
    Q4_1   d·q + m       the same
    Q5_0   d·(q − 16)    four bytes with the high bits, weight 0's the lowest, then as Q4_0
    Q5_1   d·q + m       the same
    Q8_0   d·q           one signed byte a weight

Any format whose levels are integers of that range fits if its scales are float16 numbers and its blocks whole multiples of 32; what would
have to be rounded is refused. A tensor that was read is an Int of 4, 5 or 8 bits and blocks of 32 with float16 scales; d may be negative in
those without a minimum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats.int import Int
from finebits.layouts._words import exactly, mapped
from finebits.layouts.kquants import KINDS, SUPER
from finebits.layouts.ksearch import encode, plain
from finebits.qtensor import QTensor
from finebits.quantizers.base import check_finite

BLOCK = 32
FORMATS = {
    "Q4_0": Int(4, BLOCK, True, "fp16", "full"),
    "Q4_1": Int(4, BLOCK, False, "fp16", "real"),
    "Q5_0": Int(5, BLOCK, True, "fp16", "full"),
    "Q5_1": Int(5, BLOCK, False, "fp16", "real"),
    "Q8_0": Int(8, BLOCK, True, "fp16", "full"),
}
RANGE = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q5_0": (-16, 15), "Q5_1": (0, 31), "Q8_0": (-128, 127)}
SHIFTED = "Q4_1", "Q5_1"
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SLAB = 2**22  # weights that are rounded at a time


def to_gguf(q: QTensor) -> tuple[np.ndarray, str]:
    """Bytes (*e, m, n/32·(18 | 20 | 22 | 24 | 34)) and the name of the type, the smallest of the five that holds the weight.

    >>> data, kind = to_gguf(fb.quantize(torch.eye(2, 64), fb.Int(4, 32, scale="fp16")))
    >>> data.shape, kind  # two blocks a row, each 16 bytes of codes and two of scale
    ((2, 36), 'Q4_0')
    """
    n = q.shape[-1]
    table = q.format.table(q.parts, n)
    if table is None or n % BLOCK or table.block % BLOCK:
        raise Invalid(f"GGUF has blocks of {BLOCK} in rows of whole blocks; this weight has rows of {n} in {q.format}")
    low, high = float(table.levels.min()), float(table.levels.max())
    integral = bool((table.levels == table.levels.round()).all())
    fits = [k for k, (a, b) in RANGE.items() if integral and a <= low and high <= b and (k in SHIFTED) == (table.shift is not None)]
    if not fits:
        shifted = "" if table.shift is None else " and a shift a block"
        raise Invalid(f"GGUF's {', '.join(FORMATS)} hold integers of 4, 5 or 8 bits; {q.format} has levels {low} to {high}{shifted}")
    name = fits[0]
    values = (table.levels - (RANGE[name][0] if name != "Q8_0" else 0)).to(torch.int16)
    blocks = mapped(values, q.codes()).unflatten(-1, (-1, BLOCK))
    if name == "Q8_0":
        body = blocks.to(torch.int8).view(torch.uint8)
    else:
        body = (blocks[..., :16] & 15 | (blocks[..., 16:] & 15) << 4).to(torch.uint8)
    heads = [_bytes(table.scale, "the scale", table.block, n)]
    if table.shift is not None:
        heads.append(_bytes(table.shift, "the minimum", table.block, n))
    if name.startswith("Q5"):
        heads.append(((blocks.unflatten(-1, (4, 8)) >> 4) << torch.arange(8, device=blocks.device)).sum(-1, dtype=torch.uint8))
    return torch.cat([*heads, body], -1).flatten(-2).cpu().numpy(), name


def from_gguf(data: np.ndarray, kind: str, dtype: torch.dtype = torch.float32) -> QTensor:
    """Bytes (*e, m, …) of a GGUF tensor and the name of its type -> the weight, every bit kept.

    >>> q = fb.quantize(torch.eye(2, 64), fb.Int(4, 32, scale="fp16"))
    >>> torch.equal(from_gguf(*to_gguf(q)).dequantize(), q.dequantize())
    True
    """
    if kind not in FORMATS:
        raise Invalid(f"only {', '.join(FORMATS)} are held as they are; this tensor is {kind}: dequantize it and quantize again")
    format = FORMATS[kind]
    head, high = 4 if kind in SHIFTED else 2, 4 if kind.startswith("Q5") else 0
    blocks = torch.from_numpy(np.array(data, dtype=np.uint8)).unflatten(-1, (-1, size(kind, BLOCK)))
    codes = blocks[..., head + high :]
    codes = codes ^ 128 if kind == "Q8_0" else torch.cat([codes & 15, codes >> 4], -1)  # int8 q is q + 128 as a code
    if high:
        codes |= (blocks[..., head : head + high, None] >> torch.arange(8) & 1).to(torch.uint8).flatten(-2) << 4
    parts = {"scale": _half(blocks[..., :2])} | ({"shift": _half(blocks[..., 2:4])} if head == 4 else {})
    return QTensor.from_codes(codes.flatten(-2), parts, format, dtype)


def size(kind: str, n: int) -> int:
    """Bytes of n weights in a row. Raises ValueError where they are no whole blocks.

    >>> size("Q5_0", 64), size("Q4_K", 512), size("F16", 3)
    (44, 288, 6)
    """
    block = block_of(kind)
    if n % block:
        raise Invalid(f"{kind} has blocks of {block}, and rows of this weight are {n}")
    if kind in DENSE:
        return n * DENSE[kind].itemsize
    if kind in KINDS:
        return n // block * KINDS[kind].size
    return n // block * (FORMATS[kind].bits * BLOCK // 8 + (4 if kind in SHIFTED else 2))


def block_of(kind: str) -> int:
    """Weights of a row that a type holds together.

    >>> block_of("BF16"), block_of("Q8_0"), block_of("Q6_K")
    (1, 32, 256)
    """
    return 1 if kind in DENSE else SUPER if kind in KINDS else BLOCK


def rounded(W: Tensor, kind: str, weight: Tensor | None = None) -> np.ndarray:
    """A dense weight (*e, m, n) in a type: its bytes, scales searched for the least squared error, in which columns count as `weight` (n,) says.
    Raises ValueError where rows are no whole blocks, and where a weight is not finite or too large for F16.

    >>> rounded(torch.randn(2, 256), "Q5_1").shape, rounded(torch.randn(2, 256), "Q3_K").shape
    ((2, 192), (2, 110))
    """
    n = W.shape[-1]
    rows, out = W.reshape(-1, n), np.empty((W.numel() // n, size(kind, n)), np.uint8)
    step = max(1, SLAB // n)
    for i in range(0, len(rows), step):
        out[i : i + step] = _rounded(rows[i : i + step], kind, weight)
    return out.reshape(*W.shape[:-1], -1)


def _rounded(W: Tensor, kind: str, weight: Tensor | None) -> np.ndarray:
    if kind in KINDS:
        return encode(W, kind, weight)
    if kind in DENSE:
        x = W.to(DENSE[kind])
        if not bool(torch.isfinite(x).all()):
            raise Invalid(f"{kind} holds numbers up to {torch.finfo(x.dtype).max:g}, and a weight is {float(W.abs().max()):g}: take bf16")
        return x.contiguous().view(torch.uint8).cpu().numpy()
    check_finite(W)
    low, high = RANGE[kind]
    w = None if weight is None else weight.float().clamp(min=1e-12).expand_as(W).reshape(-1, BLOCK)
    codes, scale, shift = plain(W.reshape(-1, BLOCK).float(), low, high, kind in SHIFTED, w)
    of_rows = lambda x: x.reshape(len(W), -1)  # noqa: E731
    parts = {"scale": of_rows(scale)} | ({} if shift is None else {"shift": of_rows(shift)})
    return to_gguf(QTensor.from_codes(of_rows(codes - low).to(torch.uint8), parts, FORMATS[kind], torch.float32))[0]


def _bytes(x: Tensor, what: str, block: int, n: int) -> Tensor:
    each = exactly(x, torch.float16, what).repeat_interleave(block // BLOCK, -1)[..., : n // BLOCK]
    return each[..., None].contiguous().view(torch.uint8)


def _half(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.float16).squeeze(-1)
