"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation.  Wang, Yu, Li, NeurIPS 2024.  arXiv:2407.05000v2.

Chooses A, B so that the first gradient step on (A, B) moves W along the best rank-2r approximation of G = ∂L/∂W (Thm. 3.1), with an output
scale that does not depend on the width (Thm. 3.2):

    G = U Σ Vᵀ,    A = c·Vᵀ_{:r},   B = c·U_{:, r:2r},   c = m^¼ / √γ,    W ← W − s·B A

The step is −lr·s²(G AᵀA + B Bᵀ G) = −lr·s²c²·(best rank-2r part of G), whatever the size of the loss.
Deviations: a block Krylov SVD where the authors use svd_lowrank(4r, niter=4); where 2r > min(m, n), B takes the last r directions there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.linalg import top_svd
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.grad import Grad


@dataclass(frozen=True)
class LoRAGA(Init):
    """γ, "stable_gamma" in the authors' code.

    >>> grad = fb.Grad()
    >>> grad.add(torch.eye(2), torch.tensor([[8.0, 0.0], [0.0, 2.0]]))  # G = diag(4, 1)
    >>> W = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    >>> base, start = fb.LoRAGA(gamma=2**0.5)(W, fb.LoRA(rank=1, alpha=1), torch.clone, {fb.Grad: grad})  # c = 1
    >>> start["A"].abs(), start["B"].abs()  # the first direction of G in A, the second in B
    (tensor([[1., 0.]]), tensor([[0.], [1.]]))
    >>> base + start["B"] @ start["A"]
    tensor([[3., 1.], [0., 2.]])
    """

    gamma: float = 16.0
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Grad})
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True
    for_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise Invalid(f"gamma is {self.gamma}; it must be positive")

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "LoRAGA")
        G = family.gradient(need(stats, Grad, "LoRAGA"), W, "LoRAGA")
        m, r, k = W.shape[0], adapter.rank, min(2 * adapter.rank, *W.shape)
        U, _, Vh, _ = top_svd(G, k)
        c = m**0.25 / self.gamma**0.5
        A, B = c * Vh[:r], c * U[:, k - r :]
        return quantize(W - adapter.s * B @ A), {"B": B, "A": A}
