"""Mean square of every input of a layer: the diagonal of Gram, at n numbers instead of n².

d_j = (1/t) Σ x_j²                                                                                (n,)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from finebits.stats.base import Statistic


class MeanSquare(Statistic):
    """The diagonal of Gram, (n,), float32: what a planner needs of it.

    >>> square = fb.MeanSquare()
    >>> square.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> square.value()
    tensor([5., 2.])
    """

    def term(self, x: Float[Tensor, "t n"], g: Float[Tensor, "t m"] | None) -> Float[Tensor, " n"]:
        return x.float().square().sum(0)

    def divided(self, total: Float[Tensor, " n"], lam: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return total / lam.square()
