"""Gram matrix of a layer's output gradients: the mean of g gᵀ over tokens.

S = (1/t) Σ g gᵀ,    g = ∂L/∂y ∈ ℝᵐ                                                               (m, m)

With Gram it makes the Kronecker-factored curvature of a layer, S ⊗ R.  Martens and Grosse, ICML 2015.  arXiv:1503.05671v7.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.stats.base import Statistic


class GradGram(Statistic):
    """S = mean of g gᵀ over tokens, (m, m), float32."""

    backward: ClassVar[bool] = True

    def term(self, x: Float[Tensor, "t n"], g: Float[Tensor, "t m"] | None) -> Float[Tensor, "m m"]:
        if g is None:
            raise ValueError("GradGram needs output gradients: run collect with a loss that can be differentiated")
        g = g.float()
        return g.mT @ g
