"""Pretraining Large Language Models with NVFP4.  NVIDIA, 2025.  arXiv:2509.25149v1.

Blocks of 16 values E2M1 under a micro-scale E4M3, which stands under one float32 of the tensor:

    t = max|W| / (6·448),    s = e4m3(max|w| / (6·t)),    code = nearest of ±{0 .5 1 1.5 2 3 4 6} to w/(s·t),    ŵ = level·(s·t)

Deviations: ties go to the lower level. A block below 2^-10/448 of the matrix' largest scale decodes as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.formats._floats import E2M1
from finebits.formats._stores import E4M3, Store
from finebits.formats.base import Format


@dataclass(frozen=True)
class NVFP4(Format):
    """Nothing to choose: 4 bits, blocks of 16, 4.5 bits a weight and 32 bits a matrix.

    >>> W = torch.tensor([[0.4, 2.4, 5.2, -6.0], [0.1, 0.2, 0.3, 0.0]])
    >>> fb.quantize(W, fb.NVFP4()).dequantize()  # t = 1/448; micro-scales 448, and 22 where .3/6·448 = 22.4 is wanted
    tensor([[0.5000, 2.0000, 6.0000, -6.0000], [0.0982, 0.1964, 0.2946, 0.0000]])
    """

    bits: ClassVar[int] = 4  # pyright: ignore[reportIncompatibleVariableOverride]
    block: ClassVar[int] = 16  # pyright: ignore[reportIncompatibleVariableOverride]
    scale: ClassVar[Store] = E4M3("tensor")  # pyright: ignore[reportIncompatibleVariableOverride]
    widths: ClassVar = (4,)

    def levels(self) -> tuple[float, ...]:
        return (*E2M1, *(-v for v in E2M1))
