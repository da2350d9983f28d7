"""PiSSA: Principal Singular Values and Singular Vectors Adaptation.  Meng, Wang, Zhang, NeurIPS 2024.  arXiv:2404.02948v4.

The adapter starts as the principal part of W, and what is left is frozen (eqs. 2 to 4):

    U Σ V = SVD(W),    B = U_r Σ_r^½,  A = Σ_r^½ V_r,    W_res = W − B A

Deviations: the factors are divided by √s, so that the same part is taken for every scale s of the adapter (the paper has s = 1); the triples
come from a block Krylov method with oversampling, not from a range finder of exactly r columns. Where the weight is being quantized, W_res is
what is quantized (QPiSSA with one step).
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
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class PiSSA(Init):
    """Nothing to choose: the rank is the adapter's.

    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> base, start = fb.PiSSA()(W, fb.LoRA(rank=1, alpha=1), torch.clone, {})  # no quantizer
    >>> base, start["B"] @ start["A"]
    (tensor([[0., 0.], [0., 1.]]), tensor([[3., 0.], [0., 0.]]))
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "PiSSA")
        svd = top_svd(W, adapter.rank)
        return quantize(W - family.product(svd)), family.halves(svd.U, svd.S, svd.Vh, adapter.s)
