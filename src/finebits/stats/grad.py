"""Gradient of the mean loss per token with respect to a layer's weight.

    G = (1/t) Σ g xᵀ,    g = ∂L/∂y ∈ ℝᵐ, x ∈ ℝⁿ                                                       (m, n)

It is made of inputs and output gradients, so the weight need not require one: frozen and quantized bases are served alike.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.stats.base import Statistic


class Grad(Statistic):
    """G = ∂(mean loss)/∂W, (m, n), float32.

    >>> grad = fb.Grad()
    >>> grad.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]))  # x, and ∂L/∂y
    >>> grad.value()
    tensor([[3., 6.], [0., 0.]])
    """

    backward: ClassVar[bool] = True

    def term(self, x: Float[Tensor, "t n"], g: Float[Tensor, "t m"] | None) -> Float[Tensor, "m n"]:
        if g is None:
            raise Invalid("Grad needs output gradients: run collect with a loss that can be differentiated")
        return g.float().mT @ x.float()

    def divided(self, total: Float[Tensor, "m n"], lam: Float[Tensor, " n"]) -> Float[Tensor, "m n"]:
        return total / lam
