"""TIES-Merging: Resolving Interference When Merging Models.  Yadav, Tam, Choshen, Raffel, Bansal, NeurIPS 2023.  arXiv:2306.01708v2.

Alg. 1, of task vectors τ₁ … τ_k, entry by entry:
    trim      τ̂ᵢ = τᵢ where |τᵢ| is among the largest k % of its entries, else 0
    elect     γ = sgn(Σᵢ τ̂ᵢ)
    merge     τ = mean of those τ̂ᵢ that have the sign γ
Deviations: the task vectors are the factors A and B of a low-rank update, each trimmed by itself, as in PEFT; so the update stays of one rank.
Weights stand before the τ̂ᵢ when they are merged, not when the sign is elected; an entry that adds up to 0 elects +. Both as in PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.merging.base import Factors, check_density, elected, entrywise


@dataclass(frozen=True)
class TIES:
    """Trim, elect, merge; `density` is the share of entries that stay.

    >>> one, two = (Factors(torch.ones(1, 1), torch.tensor([row])) for row in ([3.0, -2.0, 0.1], [1.0, 4.0, 0.1]))
    >>> TIES(density=0.67)([one, two], [1.0, 1.0], torch.Generator()).A  # of −2 and 4, plus is elected
    tensor([[2., 4., 0.]])
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, each: Sequence[Factors], weights: Sequence[float], gen: Generator) -> Factors:
        return entrywise(each, weights, self._merge)

    def _merge(self, tau: Float[Tensor, "k ..."], weights: Float[Tensor, " k"]) -> Float[Tensor, ...]:
        return elected(torch.stack([trim(t, self.density) for t in tau]), weights)


def trim(t: Float[Tensor, ...], density: float) -> Float[Tensor, ...]:
    """The largest entries by magnitude, the others 0.

    >>> trim(torch.tensor([1.0, -3.0, 2.0]), 0.67)
    tensor([ 0., -3.,  2.])
    """
    kept = torch.zeros(t.numel(), dtype=t.dtype)
    at = t.abs().flatten().topk(int(density * t.numel())).indices
    kept[at] = t.flatten()[at]
    return kept.view(t.shape)
