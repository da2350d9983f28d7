"""MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning.  Wang et al., NAACL 2025.  arXiv:2406.09044v3.

The adapter starts as the minor part of W, so that training leaves the principal part alone (eqs. 3 to 5), k = min(m, n):

    U Σ V = SVD(W),    B = U_{k−r:k} Σ^½,  A = Σ^½ V_{k−r:k},    W_p = W − B A

Deviations: the factors are divided by √s. The smallest triples need the full SVD.
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
class MiLoRA(Init):
    """Nothing to choose: the rank is the adapter's.

    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> base, start = fb.MiLoRA()(W, fb.LoRA(rank=1, alpha=1), torch.clone, {})
    >>> base, start["B"] @ start["A"]
    (tensor([[3., 0.], [0., 0.]]), tensor([[0., 0.], [0., 1.]]))
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True
    for_training: ClassVar[bool] = True

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "MiLoRA")
        U, S, Vh, _ = top_svd(W, min(W.shape), exact=True)
        r = adapter.rank
        U, S, Vh = U[:, -r:], S[-r:], Vh[-r:]
        return quantize(W - U * S @ Vh), family.halves(U, S, Vh, adapter.s)
