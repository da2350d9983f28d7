"""Gram matrix of a layer's inputs: the mean of x xᵀ over tokens.

R = (1/t) Σ x xᵀ,    x ∈ ℝⁿ                                                                       (n, n)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from finebits.stats.base import Statistic


class Gram(Statistic):
    """R = mean of x xᵀ over tokens, (n, n), float32.

    >>> gram = fb.Gram()
    >>> gram.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> gram.value()  # the mean of [1 2]ᵀ[1 2] and [3 0]ᵀ[3 0]
    tensor([[5., 1.], [1., 2.]])
    """

    def term(self, x: Float[Tensor, "t n"], g: Float[Tensor, "t m"] | None) -> Float[Tensor, "n n"]:
        x = x.float()
        return x.mT @ x

    def divided(self, total: Float[Tensor, "n n"], lam: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        return total / lam / lam[:, None]
