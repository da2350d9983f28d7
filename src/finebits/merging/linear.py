"""Weighted means of the factors of low-rank updates: of the same rank as each, and no sum of the updates.

A = Σᵢ ±√|wᵢsᵢ|·Aᵢ,   B = Σᵢ √|wᵢsᵢ|·Bᵢ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from finebits.merging.base import Factors, entrywise


@dataclass(frozen=True)
class Linear:
    """What PEFT calls linear.

    >>> one = Factors(torch.ones(3, 1), torch.ones(1, 2))
    >>> Linear()([one, one], [0.25, 0.25], torch.Generator()).A  # ½ of each
    tensor([[1., 1.]])
    """

    def __call__(self, each: Sequence[Factors], weights: Sequence[float], gen: Generator) -> Factors:
        return entrywise(each, weights, lambda t, w: torch.einsum("k...,k->...", t, w))
