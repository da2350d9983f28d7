"""CorDA: Context-Oriented Decomposition Adaptation of Large Language Models.  Yang et al., NeurIPS 2024.  arXiv:2406.05223v3.

The components of W are ordered by what they do to inputs of a kind, through those inputs' covariance C = E x xᵀ (eqs. 1 to 3):

    U Σ Vᵀ = SVD(W C),    W = Σ_i σ_i u_i (v_iᵀ C⁻¹)

mode="preview": the adapter takes the r largest (C from the new task's data); mode="preserve": the r smallest (C from data whose knowledge must
stay). B = U Σ^½, A = Σ^½ Vᵀ C⁻¹ of those, W ← W − B A.
Deviations: C + λI with λ = damp·mean(diag C) in the place of C, where the authors add to the diagonal until C·C⁻¹ is near I; every
input counts as it is, where they divide each batch by its largest entry; the factors are divided by √s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.linalg import top_svd
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.gram import Gram


@dataclass(frozen=True)
class CorDA(Init):
    """`mode` is "preview" (instruction-previewed adaptation) or "preserve" (knowledge-preserved).

    >>> gram = fb.Gram()
    >>> gram.add(torch.tensor([[1.0, 0.0], [0.0, 10.0]]))  # the second input is ten times as large
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> base, start = fb.CorDA()(W, fb.LoRA(rank=1, alpha=1), torch.clone, {fb.Gram: gram})
    >>> base, start["B"] @ start["A"]  # so its weight does more than the 3
    (tensor([[3., 0.], [0., 0.]]), tensor([[0., 0.], [0., 1.]]))
    """

    mode: Literal["preview", "preserve"] = "preview"
    damp: float = 0.01
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True
    for_training: ClassVar[bool] = True

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "CorDA")
        L = family.Outputs(need(stats, Gram, "CorDA"), self.damp, W).S
        U, S, Vh, _ = (
            top_svd(W @ (L @ L.mT), min(W.shape), exact=True) if self.mode == "preserve" else top_svd(W @ (L @ L.mT), adapter.rank)
        )
        U, S, Vh = U[:, -adapter.rank :], S[-adapter.rank :], Vh[-adapter.rank :]
        V = torch.cholesky_solve(Vh.mT, L).mT
        return quantize(W - U * S @ V), family.halves(U, S, V, adapter.s)
