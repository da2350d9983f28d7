"""DARE: Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch.
Yu, Yu, Yu, Huang, Li, ICML 2024.  arXiv:2311.03099v3.

Drop And REscale (eq. 1), p the share that is dropped, then a weighted sum:
    mᵢ ~ Bernoulli(p),   τ̃ᵢ = (1 − mᵢ) ⊙ τᵢ,   τ̂ᵢ = τ̃ᵢ/(1 − p)
Deviations: the task vectors are the factors A and B of a low-rank update, as in PEFT; `density` is 1 − p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.merging.base import Factors, check_density, dropped, entrywise


@dataclass(frozen=True)
class DARE:
    """A random share of every factor's entries, rescaled, and their weighted sum.

    >>> one = Factors(torch.ones(4, 1), torch.ones(1, 4))
    >>> DARE(density=0.5)([one], [1.0], torch.Generator().manual_seed(0)).A.unique()
    tensor([0., 2.])
    """

    density: float = 0.5

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, each: Sequence[Factors], weights: Sequence[float], gen: Generator) -> Factors:
        def merge(tau: Float[Tensor, "k ..."], w: Float[Tensor, " k"]) -> Float[Tensor, ...]:
            return torch.einsum("k...,k->...", dropped(tau, self.density, gen), w)

        return entrywise(each, weights, merge)
