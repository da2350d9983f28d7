"""LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition.  Shi et al., 2024.  arXiv:2410.13618v1.
Use it where a handful of numbers a matrix must do: between two triangular factors of the weight r of them are trained.

    W = P L diag(D) U,    W′ = W + s·P L_r diag(z − D_r) U_r,    s = α/r,    z ∈ ℝ^r trained                       (eqs. 2 to 4)

L is unit lower, U unit upper triangular, P a permutation; the leading r columns and rows are frozen. At birth z = D_r.
Deviations: what is trained is z − D_r (called z here), which starts at zero: then no base has to be moved, and weight decay pulls towards W;
where a pivot is zero, U's row is left undivided; where W has less than r of them, the rest of the factors is zero. An initialiser that starts
A and B gets z = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import LowRank
from finebits.adapters.base import Layer, Params, complete
from finebits.qtensor import dense


@dataclass(frozen=True)
class LoLDU(LowRank):
    """r trained numbers between two frozen triangular factors, B = P L_r and A = U_r.

    >>> from finebits.adapters.base import Base
    >>> W = torch.tensor([[2.0, 4.0], [1.0, 5.0]])  # [1 0; ½ 1] diag(2, 3) [1 2; 0 1]
    >>> p = fb.LoLDU(rank=1, alpha=1).params(Base(W), torch.Generator(), {})
    >>> p["B"], p["z"], p["A"]
    (tensor([[1.0000], [0.5000]]), tensor([0.]), tensor([[1., 2.]]))
    """

    rank: int = 64
    alpha: float = 64.0
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    own: ClassVar[str] = "zeros"
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        own = {"A": torch.zeros(self.rank, n), "B": torch.zeros(m, self.rank), "z": torch.zeros(self.rank)}
        if self.frozen <= start.keys():
            own["z"] = torch.ones(self.rank)
        else:
            P, L, U = _lu(dense(base.weight, torch.float32).detach())
            D = U.diagonal()
            r = min(self.rank, len(D))
            own["B"][:, :r], own["A"][:r] = (P @ L)[:, :r], (U / torch.where(D == 0, 1.0, D)[:, None])[:r]
        return complete(own, start, "LoLDU")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return base(x) + F.linear(F.linear(base.drop(x), p["A"]) * p["z"], self.s * p["B"])

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * p["B"] * p["z"], p["A"]

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank), "z": (self.rank,)}


def _lu(W: Float[Tensor, "m n"]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.lu(W)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
