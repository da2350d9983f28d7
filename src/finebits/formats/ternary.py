"""The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits.  Ma et al., 2024.  arXiv:2402.17764v1.

    γ = mean |w| over the block,    q = round(w/γ) clipped to {−1, 0, 1},    ŵ = γ·q        (equations 1 to 3)

Deviations: blocks of columns by default, where the paper has one γ a matrix (block="tensor"); its ε beside γ is left out. A code takes two
bits, not log2 3 = 1.58; the code 3 is never chosen and decodes as 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.formats._stores import Store
from finebits.formats.base import Format, Scales


@dataclass(frozen=True)
class Ternary(Format):
    """−1, 0 and 1; `block` columns share one mean magnitude, held in `scale`.

    >>> W = torch.tensor([[-3.0, 0.4, 1.2, 3.4]])  # magnitudes of 2 on average
    >>> fb.quantize(W, fb.Ternary()).dequantize()
    tensor([[-2., 0., 2., 2.]])
    """

    block: int | str = 64
    scale: str | Store = "fp32"
    unit: int | None = None
    bits: ClassVar[int] = 2  # pyright: ignore[reportIncompatibleVariableOverride]
    widths: ClassVar = (2,)
    plain: ClassVar = False
    still: ClassVar = False

    def levels(self) -> tuple[float, ...]:
        return (-1.0, 0.0, 1.0, 1.0)

    def ideal(self, W: Float[Tensor, "*r n"]) -> Scales:
        return Scales(self.cut(W.float().abs(), fill=torch.nan).nanmean(-1))
