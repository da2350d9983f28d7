"""Diagonal of the empirical Fisher information of a layer's weight, token by token.

    F_ij = (1/t) Σ (g_i x_j)²,    g = ∂L/∂y ∈ ℝᵐ, x ∈ ℝⁿ                                              (m, n)

It is the product of two squares, so no gradient of the weight is ever formed, and frozen and quantized bases are served alike.
The square of a sample's gradient (LQ-LoRA's code) has cross terms between the sample's tokens that this has not.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.stats.base import Statistic


class FisherDiag(Statistic):
    """F = mean over tokens of (∂L_t/∂W)², (m, n), float32.

    >>> fisher = fb.FisherDiag()
    >>> fisher.add(torch.tensor([[1.0, 2.0], [1.0, 0.0]]), torch.tensor([[3.0], [1.0]]))  # two tokens: x, and ∂L/∂y
    >>> fisher.value()  # the mean of [9 36] and [1 0]
    tensor([[5., 18.]])
    """

    backward: ClassVar[bool] = True

    def term(self, x: Float[Tensor, "t n"], g: Float[Tensor, "t m"] | None) -> Float[Tensor, "m n"]:
        if g is None:
            raise Invalid("FisherDiag needs output gradients: run collect with a loss that can be differentiated")
        return g.float().square().mT @ x.float().square()

    def divided(self, total: Float[Tensor, "m n"], lam: Float[Tensor, " n"]) -> Float[Tensor, "m n"]:
        return total / lam.square()
