"""GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection.  Zhao et al., ICML 2024.  arXiv:2403.03507v2.
Use it to train all weights where AdamW's state has no room: with `layerwise` no second gradient is in memory either.

Every T steps P is the first r singular vectors of the shorter side of the gradient G (m, n). With m < n (else R = G P and back(N) = N Pᵀ):

    R = Pᵀ G,    N = ρ(R),    W ← W − η α P N        (equations 2, 3 and algorithm 2)

ρ is what the inner optimizer makes of a gradient; its state has the shape of R: for Adam 2·max(m, n)·r + min(m, n)·r numbers, not 2·m·n.
P changes under the moments, which stay as they are.

Deviations: Adam's ε is added to √v after the correction of bias, as everywhere in torch; the authors' code adds it before. At m = n the basis
is the right one, as in their code (the paper: the left). At r ≥ min(m, n) P is the identity: any basis spans all there is. P is found by
randomised block Krylov iteration, unless `search` says "exact" (the SVD, as in the paper) or "warm" (one step of subspace iteration from
the last P, whose moments then mean nearly what they meant). A gradient that is not finite gives no basis; the next one is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.optim._projected import Projected, Search, project, thin
from finebits.optim._shell import State, Thin
from finebits.optim.base import Optimizer


@dataclass(frozen=True)
class GaLore(Projected):
    """`rank` is r, `gap` T, `scale` α. `inner` is ρ. With `layerwise` weights move in the backward pass, each as its gradient is there.

    >>> GaLore(rank=8).matrix(64, 96), GaLore().within.matrix(64, 96)  # bytes: two moments of 8 x 96 and a basis of 64 x 8, or AdamW's
    (8192, 49152)
    >>> W = torch.nn.Parameter(torch.zeros(2, 3))
    >>> W.grad = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    >>> GaLore(rank=1, scale=1.0, inner="sgd").make([W], lr=1.0).step()  # the gradient has rank 1: nothing of it is lost
    >>> W.data
    tensor([[ 0.,  0.,  0.],
            [-1., -2., -3.]])
    """

    rank: int = 128
    gap: int = 200
    scale: float = 0.25
    search: Search = "randomised"
    inner: str | Optimizer = "adamw"
    layerwise: bool = False
    label: ClassVar[str] = "GaLore"

    def before(self, G: Float[Tensor, "m n"], state: State) -> Tensor:
        return project(G, self.basis(G, state))

    def after(self, N: Tensor, G: Float[Tensor, "m n"], state: State) -> Float[Tensor, "m n"] | Thin:
        return thin(N, state.get("P"), G, self.scale)
