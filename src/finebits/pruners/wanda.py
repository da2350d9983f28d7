"""Wanda: A Simple and Effective Pruning Approach for Large Language Models.  Sun, Liu, Bair & Kolter, ICLR 2024.  arXiv:2306.11695v3.
Use it where rows like those of the task are at hand: it knows which inputs are large.

    S_ij = W_ij² E x_j²,    the square of the paper's |W_ij|·‖x_j‖₂ over the number of tokens

A unit j of what leads back to the states is then worth Σ_i W_ij² E x_j² = E ‖W_:j x_j‖², the energy that is lost where it alone goes.
Deviations: squares, which order a row as the paper's do, and add up over a unit; units are the paper's score taken over the columns of one
matrix, for which it has no form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Generator, Tensor

from finebits.stats.base import Statistic, Stats, need
from finebits.stats.mean_square import MeanSquare


@dataclass(frozen=True)
class Wanda:
    """Small weights of small inputs go.

    >>> seen = fb.MeanSquare()
    >>> seen.add(torch.tensor([[2.0, 0.0]]))
    >>> fb.Wanda()(torch.tensor([[1.0, -3.0]]), {fb.MeanSquare: seen}, torch.Generator())
    tensor([[4., 0.]])
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({MeanSquare})
    back: ClassVar[bool] = True

    def __call__(self, W: Float[Tensor, "m n"], stats: Stats, gen: Generator) -> Float[Tensor, "m n"]:
        return W.float().square() * need(stats, MeanSquare, "Wanda")
