"""EVA: Explained Variance Adaptation (One Initialization to Rule them All).  Paischer et al., 2024.  arXiv:2410.07170v4.

A's rows are the directions in which the layer's inputs vary most, B = 0, and ranks go where they explain most (Alg. 1):

    X = U Σ Vᵀ,    A = V_rᵀ,    ξ_j = σ_j² / ‖X‖²

`explained` gives ξ of one layer, `redistribute` the ranks of all: the budget of Σ r goes to the largest ξ, at most ρ·r to a layer. The planner
`eva_ranks` gives every layer an adapter of its rank, α moving along so that s stays (the code's adjust_scaling_factors).
Deviations: V is taken from the Gram matrix XᵀX of all tokens, which is the SVD that the authors' incremental PCA approaches batch by batch;
inputs are not centred, as in the paper's eq. 2 (the code subtracts a running mean).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.init import _family as family
from finebits.init.base import Quantize
from finebits.linalg import top_svd
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.gram import Gram


@dataclass(frozen=True)
class EVA:
    """`whiten` divides every row by √σ_j, as the code's option does."""

    whiten: bool = False
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = False

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "EVA")
        R = need(stats, Gram, "EVA").to(W.device)
        family.check_gram(R, W)
        _, S, Vh, _ = top_svd(R, adapter.rank)  # R = XᵀX / t is symmetric: S holds σ² / t
        if self.whiten:
            sigma = (stats[Gram].tokens * S.clamp_min(1e-6 * float(S[0]) or 1.0)).sqrt()  # of X, which is all tokens
            Vh = Vh / sigma.sqrt()[:, None]
        return quantize(W), {"A": Vh}


def explained(R: Float[Tensor, "n n"], components: int) -> Float[Tensor, " c"]:
    """ξ of the first components, descending: their shares of the inputs' energy."""
    return top_svd(R, components).S / R.diagonal().sum()


def redistribute(shares: dict[str, Tensor], rank: int, rho: float = 2.0) -> dict[str, int]:
    """Ranks by module: the rank·len(shares) largest of all shares, the first round(rho·rank) of every module taking part."""
    most = round(rank * rho)
    pool = sorted(((-float(x), i, name) for i, (name, s) in enumerate(shares.items()) for x in s[:most]))[: rank * len(shares)]
    return {name: sum(owner == name for _, _, owner in pool) for name in shares}
