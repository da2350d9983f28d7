"""Concatenation of the factors of low-rank updates: exact, and ranks add.

Σᵢ wᵢsᵢ·Bᵢ Aᵢ = [B₁ … B_k] [w₁s₁·A₁; …; w_ks_k·A_k]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator

from finebits.merging.base import Factors, joined


@dataclass(frozen=True)
class Cat:
    """The sum itself.

    >>> one = Factors(torch.ones(3, 1), torch.ones(1, 2))
    >>> Cat()([one, one], [1.0, 2.0], torch.Generator()).A
    tensor([[1., 1.],
            [2., 2.]])
    """

    def __call__(self, each: Sequence[Factors], weights: Sequence[float], gen: Generator) -> Factors:
        return joined(each, weights)
