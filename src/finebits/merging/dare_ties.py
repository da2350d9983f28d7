"""DARE before TIES-Merging: Language Models are Super Mario.  Yu, Yu, Yu, Huang, Li, ICML 2024.  arXiv:2311.03099v3, section 3.3, with
TIES-Merging: Resolving Interference When Merging Models.  Yadav, Tam, Choshen, Raffel, Bansal, NeurIPS 2023.  arXiv:2306.01708v2, Alg. 1.

A random share of the entries stays, rescaled, in the place of TIES's trimming; then a sign is elected and those that have it are averaged:
    τ̂ᵢ = (1 − mᵢ) ⊙ τᵢ/(1 − p),   γ = sgn(Σᵢ τ̂ᵢ),   τ = mean of those τ̂ᵢ that have the sign γ
Deviations: those of DARE and TIES here, as in PEFT: factors A and B in the place of task vectors, `density` for 1 − p, no second trimming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator

from finebits.merging.base import Factors, check_density, dropped, elected, entrywise


@dataclass(frozen=True)
class DARETIES:
    """Drop, rescale, elect, merge.

    >>> one, two = (Factors(torch.ones(1, 1), torch.tensor([row])) for row in ([3.0, -2.0], [1.0, 4.0]))
    >>> DARETIES(density=1.0)([one, two], [1.0, 1.0], torch.Generator()).A  # TIES, where nothing is dropped
    tensor([[2., 4.]])
    """

    density: float = 0.5

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, each: Sequence[Factors], weights: Sequence[float], gen: Generator) -> Factors:
        return entrywise(each, weights, lambda tau, w: elected(dropped(tau, self.density, gen), w))
