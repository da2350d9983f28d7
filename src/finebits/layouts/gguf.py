"""GGUF's plain integer blocks, to the bit: Q4_0, Q4_1, Q8_0 <-> QTensor.

Rows are blocks of 32 weights; in a block come the float16 scale d, in Q4_1 the float16 minimum m, then the codes:

    Q4_0   d·(q − 8)    weight j in the low nibble of byte j, weight j + 16 in its high nibble
    Q4_1   d·q + m      the same
    Q8_0   d·q          one signed byte a weight

Any format whose levels are integers of that range fits if its scales are float16 numbers and its blocks whole multiples of 32; what would
have to be rounded is refused. A tensor that was read is Int(4, 32) or Int(8, 32) with float16 scales; d may be negative in Q4_0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats.int import Int
from finebits.layouts._words import exactly, mapped
from finebits.qtensor import QTensor

BLOCK = 32
FORMATS = {
    "Q4_0": Int(4, BLOCK, True, "fp16", "full"),
    "Q4_1": Int(4, BLOCK, False, "fp16", "real"),
    "Q8_0": Int(8, BLOCK, True, "fp16", "full"),
}
RANGE = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q8_0": (-128, 127)}


def to_gguf(q: QTensor) -> tuple[np.ndarray, str]:
    """Bytes (*e, m, n/32·(18 | 20 | 34)) and the name of the type, the smallest of the three that holds the weight.

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
    fits = [k for k, (a, b) in RANGE.items() if integral and a <= low and high <= b and (k == "Q4_1") == (table.shift is not None)]
    if not fits:
        shifted = "" if table.shift is None else " and a shift a block"
        raise Invalid(f"GGUF's Q4_0, Q4_1 and Q8_0 hold integers of 4 or 8 bits; {q.format} has levels {low} to {high}{shifted}")
    name = fits[0]
    values = (table.levels - (RANGE[name][0] if name != "Q8_0" else 0)).to(torch.int16)
    blocks = mapped(values, q.codes()).unflatten(-1, (-1, BLOCK))
    if name == "Q8_0":
        body = blocks.to(torch.int8).view(torch.uint8)
    else:
        body = (blocks[..., :16] | blocks[..., 16:] << 4).to(torch.uint8)
    heads = [_bytes(table.scale, "the scale", table.block, n)]
    if table.shift is not None:
        heads.append(_bytes(table.shift, "the minimum", table.block, n))
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
    head = 4 if kind == "Q4_1" else 2
    body = BLOCK if kind == "Q8_0" else BLOCK // 2
    blocks = torch.from_numpy(np.array(data, dtype=np.uint8)).unflatten(-1, (-1, head + body))
    codes = blocks[..., head:]
    codes = codes ^ 128 if kind == "Q8_0" else torch.cat([codes & 15, codes >> 4], -1)  # int8 q is q + 128 as a code
    parts = {"scale": _half(blocks[..., :2])} | ({"shift": _half(blocks[..., 2:4])} if head == 4 else {})
    return QTensor.from_codes(codes.flatten(-2), parts, format, dtype)


def _bytes(x: Tensor, what: str, block: int, n: int) -> Tensor:
    each = exactly(x, torch.float16, what).repeat_interleave(block // BLOCK, -1)[..., : n // BLOCK]
    return each[..., None].contiguous().view(torch.uint8)


def _half(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.float16).squeeze(-1)
