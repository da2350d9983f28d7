"""What a kernel sees of a quantized weight, whatever its format: a table.

    w[i, j] = levels[code[i, j]] · scale[i, j // block]  (+ shift[i, j // block])

computed in float32, product first, then sum, then rounded once to the dtype asked for. Every scalar format up to 8 bits has this form
(an integer code is its own level, a zero point is a shift of −scale·zero), so one kernel per job serves all of them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class _Table(NamedTuple):
    codes: Tensor  # uint8 (*e, m, row_bytes(n, bits)), packed as finebits.blocks says
    scale: Tensor  # float32, float16 or bfloat16 (*e, m, k), k = ceil(n / block)
    shift: Tensor | None  # float32, (*e, m, k)
    levels: Tensor  # float32 (2**bits,), by code; unused codes hold any finite value
    bits: int
    block: int
    n: int


class Table(_Table):
    """A packed weight of logical shape (*e, m, n); every tensor but `levels` leads with (*e, m).

    A table that is kept, as that of a module's weight, is where a body may keep what every call would find out again (`__dict__`).
    """


class Rounding(NamedTuple):
    """How round-to-nearest picks codes: scale from the block, then a sorted grid.

    mode "absmax":  scale = max|w| / peak;                code from u = w·(1/scale)
    mode "minmax":  scale = (max − min) / peak, shift = min;   code from u = (w − shift)·(1/scale)
    Both scale and shift are rounded to `store` before the codes are chosen; 1/scale is 0 where scale < 2^-126.
    If `uniform`, rank = clamp(round_half_even(u) − first, 0, 2**bits − 1); otherwise rank = number of `mids` below u. code = order[rank].
    """

    mode: str
    peak: float
    store: str  # "fp32" | "fp16" | "bf16"; in a search also "e4m3"
    uniform: bool
    first: int  # the value of rank 0 when uniform
    mids: Tensor  # float32, sorted midpoints between neighbouring levels
    order: Tensor  # uint8, code by rank
    bits: int
    block: int
