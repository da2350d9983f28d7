"""FP8 Formats for Deep Learning.  Micikevicius et al., 2022.  arXiv:2209.05433v2.

One sign bit, and E exponent bits with M mantissa bits under bias 2^(E−1) − 1, absolute maximum on the largest level:

    e4m3    4 and 3, no infinity, one NaN a sign: largest 448 = 1.75·2^8
    e5m2    5 and 2, as IEEE: largest 57344 = 1.75·2^15

Deviations: levels are held over 2^8 and 2^15, so that scales have the size of the weights and fit 16 bits; codes are the standard's, and a
scale of the standard is ours over that power of two. Codes of NaN and infinity are never chosen and decode as the largest level of their
sign. Zero is encoded as +0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from finebits.errors import Invalid
from finebits.formats._stores import Store
from finebits.formats.base import Format


@functools.cache
def floats(exponent: int, mantissa: int, largest: float) -> tuple[float, ...]:
    """The values of all 256 codes over the power of two below `largest`, sign bit highest.

    >>> max(floats(4, 3, 448.0)) * 2**8, max(floats(5, 2, 57344.0)) * 2**15
    (448.0, 57344.0)
    """
    half, bias = [], 2 ** (exponent - 1) - 1
    for code in range(128):
        e, m = code >> mantissa, code % 2**mantissa / 2**mantissa
        half.append(min((1 + m) * 2.0 ** (e - bias) if e else m * 2.0 ** (1 - bias), largest) / 2 ** math.floor(math.log2(largest)))
    return (*half, *(-v for v in half))


@dataclass(frozen=True)
class FP8(Format):
    """`block` columns share one absmax scale, held in `scale`.

    >>> W = torch.tensor([[1.75, 1.0, 0.9, 0.3]])
    >>> fb.quantize(W, fb.FP8()).dequantize()  # eighths of a power of two: 0.9 becomes 14/16 and 0.3 becomes 10/32
    tensor([[1.7500, 1.0000, 0.8750, 0.3125]])
    >>> fb.quantize(W, fb.FP8(variant="e5m2")).dequantize()  # quarters
    tensor([[1.7500, 1.0000, 0.8750, 0.3125]])
    """

    block: int | str = 64
    variant: Literal["e4m3", "e5m2"] = "e4m3"
    scale: str | Store = "fp32"
    unit: int | None = None
    bits: ClassVar[int] = 8  # pyright: ignore[reportIncompatibleVariableOverride]
    widths: ClassVar = (8,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("e4m3", "e5m2"):
            raise Invalid(f"FP8 has the variants e4m3 and e5m2, not {self.variant!r}")

    def levels(self) -> tuple[float, ...]:
        return floats(4, 3, 448.0) if self.variant == "e4m3" else floats(5, 2, 57344.0)
