"""The best update of a lower rank: truncated singular value decomposition of a sum of low-rank updates, through QR of its factors.
Eckart and Young, Psychometrika 1936, for what is best; nothing of the size of the weight is made:

    [B₁ … B_k] = Q₁ R₁,   [w₁s₁·A₁; …]ᵀ = Q₂ R₂,   R₁ R₂ᵀ = U S Vᵀ   ⇒   B = Q₁ U √S,   A = √S Vᵀ Q₂ᵀ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.errors import Invalid
from finebits.merging.base import Factors, joined


@dataclass(frozen=True)
class SVD:
    """The best rank-`rank` approximation of the sum; without a rank, of the largest of those that came.

    >>> one, two = Factors(torch.eye(3)[:, :1], torch.eye(3)[:1], 2.0), Factors(torch.eye(3)[:, 1:2], torch.eye(3)[1:2])
    >>> sum_ = SVD(rank=1)([one, two], [1.0, 1.0], torch.Generator())
    >>> (sum_.B @ sum_.A).diagonal().round().abs()  # 2 is more than 1
    tensor([2., 0., 0.])
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise Invalid(f"rank is {self.rank}; it must be at least 1")

    def __call__(self, each: Sequence[Factors], weights: Sequence[float], gen: Generator) -> Factors:
        return shortened(joined(each, weights), rank=self.rank or max(f.rank for f in each))[0]


def shortened(update: Factors, rank: int | None = None, energy: float | None = None) -> tuple[Factors, float]:
    """(the update in its best `rank` triples, or in the fewest that hold `energy` of its squared norm; the relative error ‖Δ − Δ_r‖/‖Δ‖).

    >>> update = Factors(torch.eye(3), torch.diag(torch.tensor([4.0, 3.0, 0.0])))
    >>> best, error = shortened(update, energy=0.6)
    >>> best.rank, round(error, 4)  # 4² of 4² + 3² is .64
    (1, 0.6)
    """
    U, S, Vh = triples(update)
    squares = S.square()
    total, tails = float(squares.sum()), squares.flip(0).cumsum(0).flip(0)  # what triples from i on hold
    if energy is not None:
        rank = int((tails > (1 - energy) * total).sum())
    r = max(1, min(rank or len(S), len(S)))
    lost = float(tails[r]) if r < len(S) else 0.0
    root = S[:r].sqrt()
    dtype = update.A.dtype
    return Factors((U[:, :r] * root).to(dtype), (root[:, None] * Vh[:r]).to(dtype)), (lost / total) ** 0.5 if total > 0 else 0.0


def triples(update: Factors) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """U, S, Vh of s·B A in float64.

    >>> triples(Factors(torch.ones(4, 1), torch.ones(1, 4), 0.5))[1]
    tensor([2.], dtype=torch.float64)
    """
    Q1, R1 = torch.linalg.qr(update.B.double())
    Q2, R2 = torch.linalg.qr(update.s * update.A.double().mT)
    U, S, Vh = torch.linalg.svd(R1 @ R2.mT, full_matrices=False)
    return Q1 @ U, S, Vh @ Q2.mT
