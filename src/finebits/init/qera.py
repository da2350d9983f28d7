"""QERA: an Analytical Framework for Quantization Error Reconstruction.  Zhang et al., ICLR 2025.  arXiv:2410.06040v2.

The low-rank term that makes the expected output error least, in closed form (Thm. 1, "QERA-exact"):

    min_{rank C ≤ r} E ‖(W − Q − C) x‖²,    R = E x xᵀ
    Q = quant(W),    U Σ Vᵀ = SVD((W − Q) R^½),    s·B A = U_r Σ_r V_rᵀ R^(−½)

metric="approx" is the same for inputs that do not correlate (Thm. 2, "QERA-approx"): R^½ = diag(√E x_j²), which takes n numbers instead of n².

Deviations: R^½ is the Cholesky factor of R + λI, λ = damp·mean(diag R): any S with S Sᵀ = R gives the same product, since S = R^½ O with O
orthogonal and O cancels, and a factor of 1536 inputs takes a hundredth of the time of the symmetric root; the damping serves R that are
singular; Σ_r is split in halves over the factors and divided by the adapter's scale.
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
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.gram import Gram
from finebits.stats.mean_square import MeanSquare


@dataclass(frozen=True)
class QERA(Init):
    """The closed form; `metric` is "exact" or "approx", `damp` relative to the mean square of the inputs.

    >>> gram = fb.Gram()
    >>> gram.add(torch.tensor([[1.0, 0.0], [0.0, 10.0]]))  # the second input is ten times as large
    >>> W = torch.tensor([[1.4, 0.0], [0.0, 1.3]])
    >>> Q, start = fb.QERA()(W, fb.LoRA(rank=1, alpha=1), torch.round, {fb.Gram: gram})
    >>> Q, start["B"] @ start["A"]  # so its .3 weigh more than .4
    (tensor([[1., 0.], [0., 1.]]), tensor([[0.0000, 0.0000], [0.0000, 0.3000]]))
    """

    damp: float = 1e-4
    metric: Literal["exact", "approx"] = "exact"
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The Gram matrix of the inputs, or its diagonal.

        >>> fb.QERA().needs == {fb.Gram}, fb.QERA(metric="approx").needs == {fb.MeanSquare}
        (True, True)
        """
        return frozenset({Gram if self.metric == "exact" else MeanSquare})

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "QERA")
        Q = quantize(W)
        if self.metric == "approx":
            root = family.sizes(need(stats, MeanSquare, "QERA"), self.damp, W)
            U, S, Vh, _ = top_svd((W - dense(Q, torch.float32)) * root, adapter.rank)
            return Q, family.halves(U, S, Vh / root, adapter.s)
        out = family.Outputs(need(stats, Gram, "QERA"), self.damp, W)
        U, S, V = out.top(W - dense(Q, torch.float32), adapter.rank)
        return Q, family.halves(U, S, V, adapter.s)
