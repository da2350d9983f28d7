"""VeRA: Vector-based Random Matrix Adaptation.  Kopiczko et al., ICLR 2024.  arXiv:2310.11454v2.
Use it when many adapters have to be kept: r + m trained numbers a matrix, between random factors that are the same for all.

    W′ = W + diag(b) B diag(d) A,    B ∈ ℝ^{m×r},  A ∈ ℝ^{r×n} random and frozen,    b ∈ ℝ^m,  d ∈ ℝ^r trained            (eq. 2)

At birth b = 0 and d is `d_initial`. A and B are Kaiming-uniform: in ±√(6/n) and ±√(6/r).
Deviations: weights of one shape have one A and B, where the paper has one pair, as large as the largest weight needs, and takes its corner.
They are stored, not only drawn from the seed: then pairs that others drew can be loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Product
from finebits.adapters._product import product
from finebits.adapters.base import Layer, Params, complete
from finebits.errors import Invalid


@dataclass(frozen=True)
class VeRA(Product):
    """Two trained diagonals around shared random factors.

    >>> p = {"A": torch.ones(1, 2), "B": torch.ones(2, 1), "d": torch.tensor([3.0]), "b": torch.tensor([1.0, 2.0])}
    >>> fb.VeRA(rank=1).merged(p, torch.zeros(2, 2))
    tensor([[3., 3.], [6., 6.]])
    >>> fb.VeRA(rank=256).size(3072, 3072)  # r + m
    3328
    """

    rank: int = 256
    d_initial: float = 0.1
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    shared: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise Invalid(f"rank is {self.rank}; it must be at least 1")
        if self.d_initial == 0:
            raise Invalid("d_initial is 0; with b = 0 as well nothing would have a gradient: give it another value, such as 0.1")

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        own = {"d": torch.full((self.rank,), self.d_initial), "b": torch.zeros(m)}
        for k, shape in (("A", (self.rank, n)), ("B", (m, self.rank))):
            own[k] = torch.empty(shape)
            if k not in start:
                own[k].uniform_(-1, 1, generator=gen).mul_(math.sqrt(6 / shape[1]))
        return complete(own, start, "VeRA")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        L, R = self.lowrank(p)
        return product(x, R, L, 1.0, base)

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return p["b"][:, None] * p["d"] * p["B"], p["A"]

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank), "d": (self.rank,), "b": (m,)}
