"""SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models (the layer).  Li et al., ICLR 2025.  arXiv:2411.05007v3.
Use it with init svdquant, where outliers of the inputs make four bits lose too much.

    y = x̂ Ŵ_baseᵀ + s·(x̂ Aᵀ) Bᵀ,    x̂ = x diag(λ)⁻¹,    W′ = (Ŵ_base + s·B A) diag(λ)⁻¹,    s = α/r                        (eqs. 3 to 5)

The base is held in smoothed columns, W diag(λ), and the inputs are divided by λ on their way in. B and A are trained, λ ∈ ℝⁿ stays.
At birth λ = 1, B = 0 and A is uniform in ±1/√n. A second adapter laid over this one sees the inputs as they come.
Deviations: the inputs stay in the compute dtype; λ is divided out here, where the paper folds it into the layer before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Scaled
from finebits.adapters.base import Form, Layer, Params, Rescaled, complete
from finebits.qtensor import dense


@dataclass(frozen=True)
class Smoothed(Scaled):
    """A low-rank branch beside a base whose columns were multiplied by λ ("lam"). It is not a low-rank update of its base alone.

    >>> p = {"B": torch.tensor([[1.0]]), "A": torch.tensor([[0.0, 2.0]]), "lam": torch.tensor([2.0, 5.0])}
    >>> fb.Smoothed(rank=1, alpha=1).merged(p, torch.tensor([[2.0, 8.0]]))  # (2 + 0)/2 and (8 + 2)/5
    tensor([[1., 2.]])
    """

    rank: int = 32
    alpha: float = 32.0
    frozen: ClassVar[frozenset[str]] = frozenset({"lam"})
    own: ClassVar[str] = "svdquant"
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros", "svdquant"})
    form: ClassVar[Form] = "scaled"

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n)
        return complete({"A": A, "B": torch.zeros(m, self.rank), "lam": torch.ones(n)}, start, "Smoothed")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        x = x / p["lam"]
        return base(x) + F.linear(F.linear(base.drop(x), p["A"]), self.s * p["B"])

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return (dense(W) + self.s * p["B"] @ p["A"]) / p["lam"]

    def scaled(self, p: Params, W: Float[Tensor, "m n"]) -> Rescaled:
        """Columns by 1/λ, and the branch behind it."""
        return Rescaled(None, 1 / p["lam"], self.s * p["B"], p["A"] / p["lam"])

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank), "lam": (n,)}
