"""Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy (Bi-LoRA).
Jie et al., ICCV 2023.  arXiv:2307.16867v1.
Use it where what is stored for a task must be smallest: at equal bytes, many directions of one bit learn more than one of 32.

    W′ = W + s·B̂ Â,    ŵ = value(v)·σ + μ,    v = (w − μ)/(σ + 10⁻⁵),    s = α/r

μ and σ (unbiased) are those of a whole factor; value is the nearest quantile median of N(0, 1), ±.6745 for one bit (finebits.formats.median).
Gradients pass through `value` as if it were the identity, and through μ and σ.
At birth A is uniform in ±1/√n and B Gaussian with deviation .001: a factor of zeros has no signs, so that the update is small and not zero.
A saved adapter holds ⌈bits·numbers/8⌉ bytes a factor and its μ and σ, and comes back to the bit.
Deviations: μ and σ are computed with in steps of σ/4096, so that weights of the same codes, mean and deviation are the same adapter; the authors
draw B from a Gaussian that is cut at ±2, which is further out than any of its numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters import _coarse
from finebits.adapters._coarse import coarse
from finebits.adapters._family import LowRank
from finebits.adapters.base import Layer, Params, complete


@dataclass(frozen=True)
class OneBit(LowRank):
    """A low-rank update whose factors are computed with in one bit a number, or two.

    >>> p = {"B": torch.tensor([[2.0]]), "A": torch.tensor([[-1.0, 0.0, 1.0]])}  # B is alone and has no deviation, A's is 1
    >>> fb.OneBit(rank=1, alpha=1).merged(p, torch.zeros(1, 3))
    tensor([[-1.3490, -1.3490,  1.3490]])
    """

    rank: int = 32
    alpha: float = 32.0
    bits: Literal[1, 2] = 1
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})
    kept: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    identity_at_birth: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _coarse.check_bits(self.bits)

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n)
        return complete({"A": A, "B": 0.001 * torch.randn(m, self.rank, generator=gen)}, start, "OneBit")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        L, R = self.lowrank(p)
        return base(x) + F.linear(F.linear(base.drop(x), R.to(x.dtype)), L.to(x.dtype))

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * coarse(p["B"], self.bits), coarse(p["A"], self.bits)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank)}

    def packed(self, p: Params) -> Params:
        return _coarse.packed(p, self.bits)

    def unpacked(self, p: Params, m: int, n: int) -> Params:
        return _coarse.unpacked(p, self.shapes(m, n), self.bits)
