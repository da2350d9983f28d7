"""Microscaling Data Formats for Deep Learning (MXFP4).  Rouhani et al., 2023.  arXiv:2310.10537v3.

Blocks of 32 values E2M1 under a shared scale E8M0, a power of two in one byte (Algorithm 1, and OCP Microscaling Formats v1.0):

    X = 2^(⌊log2 max|w|⌋ − 2),    code = nearest of ±{0 .5 1 1.5 2 3 4 6} to w/X,    ŵ = level·X

so the largest weight of a block lands in [4, 8), and what is above 6 saturates. This is FP4 under scales max|w|/4 rounded down to powers
of two.

Deviations: the exponent byte of a block of zeros is 0 (2^-127). Ties go to the lower level, not to the even mantissa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.formats._floats import E2M1
from finebits.formats._stores import Pow2, Store
from finebits.formats.base import Format


@dataclass(frozen=True)
class MXFP4(Format):
    """Nothing to choose: 4 bits, blocks of 32, 4.25 bits a weight.

    >>> W = torch.tensor([[0.4, 2.4, 5.2, -7.9]])
    >>> fb.quantize(W, fb.MXFP4()).dequantize()  # scale 2^(⌊log2 7.9⌋ − 2) = 1; what is above 6 saturates
    tensor([[0.5000, 2.0000, 6.0000, -6.0000]])
    >>> fb.MXFP4().storage_bits(4096, 4096) / 4096**2
    4.25
    """

    bits: ClassVar[int] = 4  # pyright: ignore[reportIncompatibleVariableOverride]
    block: ClassVar[int] = 32  # pyright: ignore[reportIncompatibleVariableOverride]
    scale: ClassVar[Store] = Pow2("floor")  # pyright: ignore[reportIncompatibleVariableOverride]
    peak: ClassVar[float] = 4.0
    widths: ClassVar = (4,)

    def levels(self) -> tuple[float, ...]:
        return (*E2M1, *(-v for v in E2M1))
