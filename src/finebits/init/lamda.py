"""LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation.  Azizi et al., EMNLP 2024.  arXiv:2406.12832v1.

The spectral start of the adapter `slora` with train="left" (A frozen, B and the core trained; fig. 1):

    U Σ V = SVD(W),    B = U_r,  N = Σ_r / s,  A = V_r,    W ← W − s·B N A

Deviations: the released code has no SVD (A is random, B = 0) and this follows the paper; N is divided by s. B's columns are in the
order in which rule `lamda_freeze` freezes them, by falling singular value.
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
class LaMDA(Init):
    """Nothing to choose: the rank is the adapter's.

    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> base, start = fb.LaMDA()(W, fb.SLoRA(rank=1, alpha=1, train="left"), torch.clone, {})
    >>> base, start["N"], start["B"] @ start["N"] @ start["A"]
    (tensor([[0., 0.], [0., 1.]]), tensor([[3.]]), tensor([[3., 0.], [0., 0.]]))
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True
    for_training: ClassVar[bool] = True

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "LaMDA")
        svd = top_svd(W, adapter.rank)
        return quantize(W - family.product(svd)), {"B": svd.U, "N": svd.S.diag() / adapter.s, "A": svd.Vh}
