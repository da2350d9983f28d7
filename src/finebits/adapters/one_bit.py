"""Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy (Bi-LoRA).
Jie et al., ICCV 2023.  arXiv:2307.16867v1.
Use it where what is stored for a task must be smallest: at equal bytes, many directions of one bit learn more than one of 32.

    W′ = W + s·B̂ Â,    ŵ = value(v)·σ + μ,    v = (w − μ)/(σ + 10⁻⁵),    s = α/r

μ and σ (unbiased) are those of a whole factor; value is the nearest quantile median of N(0, 1), ±.6745 for one bit (finebits.formats.median).
Gradients pass through `value` as if it were the identity, and through μ and σ.
At birth A is uniform in ±1/√n and B Gaussian with deviation .001: a factor of zeros has no signs, so that the update is small and not zero.
Deviations: the authors draw B from a Gaussian that is cut at ±2, which is further out than any of its numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import LowRank
from finebits.adapters.base import Layer, Params, complete
from finebits.errors import Invalid
from finebits.formats._medians import medians
from finebits.formats.base import level_tensor

LEVELS = {bits: medians(bits) for bits in (1, 2)}


@dataclass(frozen=True)
class OneBit(LowRank):
    """A low-rank update whose factors are computed with in one bit a number, or two.

    >>> p = {"B": torch.tensor([[3.0], [1.0]]), "A": torch.tensor([[-1.0, 1.0]])}
    >>> fb.OneBit(rank=1, alpha=1).merged(p, torch.zeros(2, 2))  # B is 2 ± .6745·√2, A ± .6745·√2
    tensor([[-2.8177,  2.8177],
            [-0.9978,  0.9978]])
    """

    rank: int = 32
    alpha: float = 32.0
    bits: Literal[1, 2] = 1
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})
    identity_at_birth: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (1, 2):
            raise Invalid(f"bits is {self.bits}; it can be 1 or 2")

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n)
        return complete({"A": A, "B": 0.001 * torch.randn(m, self.rank, generator=gen)}, start, "OneBit")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        L, R = self.lowrank(p)
        return base(x) + F.linear(F.linear(base.drop(x), R), L)

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * coarse(p["B"], self.bits), coarse(p["A"], self.bits)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank)}


def coarse(w: Tensor, bits: int) -> Tensor:
    """ŵ, in w's dtype, with the gradient of the paper.

    >>> coarse(torch.tensor([-2.0, -1.0, 1.0, 2.0]), 1)  # σ = 1.8257
    tensor([-1.2314, -1.2314,  1.2314,  1.2314])
    """
    dtype, w = w.dtype, w.float()
    mean, sigma = w.mean(), w.std() if w.numel() > 1 else w.new_zeros(())
    v = (w - mean) / (sigma + 1e-5)
    levels = level_tensor(LEVELS[bits], w.device)
    code = torch.bucketize(v.detach(), (levels[1:] + levels[:-1]) / 2)
    return ((v + (levels[code] - v).detach()) * sigma + mean).to(dtype)
