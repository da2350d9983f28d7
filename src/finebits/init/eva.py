"""EVA: Explained Variance Adaptation (One Initialization to Rule them All).  Paischer et al., 2024.  arXiv:2410.07170v4.

A's rows are the directions in which the layer's inputs vary most, B = 0 (Alg. 1; ranks by what they explain are `ranks/eva_ranks.py`):

    X = U Σ Vᵀ,    A = V_rᵀ

Deviations: V is taken from the Gram matrix XᵀX of all tokens, which is the SVD that the authors' incremental PCA approaches batch by batch;
inputs are not centred, as in the paper's eq. 2 (the code subtracts a running mean), and each counts once (the code goes through its data again
until the directions stand, and `whiten` divides by what that adds up to).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.linalg import top_svd
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.gram import Gram


@dataclass(frozen=True)
class EVA(Init):
    """`whiten` divides every row by √σ_j, as the code's option does.

    >>> gram = fb.Gram()
    >>> gram.add(torch.tensor([[3.0, 4.0]]))
    >>> base, start = fb.EVA()(torch.tensor([[1.4, -0.6]]), fb.LoRA(rank=1), torch.round, {fb.Gram: gram})
    >>> base, start["A"].abs()
    (tensor([[1., -1.]]), tensor([[0.6000, 0.8000]]))
    """

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
