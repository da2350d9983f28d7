"""Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy.
Jie et al., ICCV 2023.  arXiv:2307.16867v1.

Weights are standardised and every one goes to the nearest of 2^b quantile medians of N(0, 1), the fixed point of k-medians:

    v = (w − μ)/σ,    edges: middles of neighbouring values,    value of a cell = Φ⁻¹(middle of Φ over its edges),    ŵ = value·σ + μ

b = 1: ±.6745;  b = 2: ±.3778, ±1.2657.

Deviations: μ and σ belong to a block of columns by default, where the paper has one pair a matrix (block="tensor"); both are held as the
scale is. σ is unbiased, and 0 for a single weight; the paper's 1e-5 beside σ is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats._medians import medians
from finebits.formats._stores import width
from finebits.formats.base import STORES, Format, Scales


@dataclass(frozen=True)
class Median(Format):
    """One or two bits; `block` columns share a mean and a standard deviation, both held in `scale` (fp32, fp16 or bf16).

    >>> W = torch.tensor([[-1.0, 1.0, 3.0, 5.0]])  # mean 2, deviation √(20/3) = 2.582
    >>> fb.quantize(W, fb.Median(1)).dequantize()  # 2 ± .6745 · 2.582
    tensor([[0.2585, 0.2585, 3.7415, 3.7415]])
    """

    bits: int = 1
    block: int | str = 64
    scale: str = "fp32"  # pyright: ignore[reportIncompatibleVariableOverride]
    unit: int | None = None
    widths: ClassVar = (1, 2)
    plain: ClassVar = False
    still: ClassVar = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in STORES:
            raise Invalid(f"mean and deviation are held plain ({', '.join(STORES)}), not as {self.scale}")

    def levels(self) -> tuple[float, ...]:
        return medians(self.bits)

    def ideal(self, W: Float[Tensor, "*r n"]) -> Scales:
        w = self.cut(W.float(), fill=torch.nan)
        mean = w.nanmean(-1)
        count = w.isfinite().sum(-1)
        square = (w - mean[..., None]).square().nansum(-1)
        return Scales((square / (count - 1).clamp(min=1)).sqrt(), mean)

    def scale_bits(self, n: int) -> int:
        return super().scale_bits(n) + width(self.scale) * self.n_blocks(n)
