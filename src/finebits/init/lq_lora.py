"""LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning.  Guo et al., ICLR 2024.  arXiv:2311.12023v4.

Finds W ≈ Q + L1 L2 by alternation, the low-rank part first (Alg. 1), from Q = 0:

    L1, L2 = argmin_{rank r} ‖W − Q − L1 L2‖,    Q = quant(W − L1 L2)                                           until the error grows

weighting="fisher" (section 3.3) weighs the error by √F, F the diagonal of the Fisher information, through its means over rows and columns:

    D_row = diag(√mean_j F_ij),  D_col = diag(√mean_i F_ij),    U Σ Vᵀ = SVD(D_row E D_col),    L1 = D_row⁻¹ U Σ^½,  L2 = Σ^½ Vᵀ D_col⁻¹

Deviations: the best iterate is returned, where the code returns the one after the increase; rows and columns with no information weigh 1e-3
of the mean; the Q step is unweighted, as in the code; factors are divided by √s. The ILP is a planner, not an initialiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.linalg import check_statistic, top_svd
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.fisher_diag import FisherDiag


@dataclass(frozen=True)
class LQLoRA(Init):
    """At most `steps` alternations; `weighting` is "none" or "fisher".

    >>> W = torch.tensor([[3.4, 0.0], [0.0, 1.3]])
    >>> Q, start = fb.LQLoRA()(W, fb.LoRA(rank=1, alpha=1), torch.round, {})
    >>> Q, start["B"] @ start["A"]  # the largest direction first, and the rest in whole numbers
    (tensor([[0., 0.], [0., 1.]]), tensor([[3.4000, 0.0000], [0.0000, 0.0000]]))
    """

    steps: int = 20
    weighting: Literal["none", "fisher"] = "none"
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Invalid(f"LQLoRA needs steps >= 1, not {self.steps}")

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The diagonal Fisher information, if it weighs.

        >>> fb.LQLoRA().needs == frozenset(), fb.LQLoRA(weighting="fisher").needs == {fb.FisherDiag}
        (True, True)
        """
        return frozenset({FisherDiag}) if self.weighting == "fisher" else frozenset()

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "LQLoRA")
        row, col, root = torch.ones(W.shape[0], 1, device=W.device), torch.ones(1, W.shape[1], device=W.device), torch.ones_like(W)
        if self.weighting == "fisher":
            F = need(stats, FisherDiag, "LQLoRA(weighting='fisher')").to(W.device)
            if F.shape != W.shape:
                raise Invalid(f"FisherDiag is {tuple(F.shape)} and the weight {tuple(W.shape)}: the statistics are another module's")
            check_statistic(F)
            row, col, root = _floor(F.mean(1, keepdim=True).sqrt()), _floor(F.mean(0, keepdim=True).sqrt()), F.sqrt()
        best, Q = None, torch.zeros_like(W)
        for _ in range(self.steps):
            U, S, Vh, _ = top_svd(row * (W - dense(Q, torch.float32)) * col, adapter.rank)
            L1, L2 = U / row, Vh / col
            Q = quantize(W - L1 * S @ L2)
            error = float((root * (W - dense(Q, torch.float32) - L1 * S @ L2)).norm())
            if best is not None and not error < best[0]:
                break
            best = error, Q, (L1, S, L2)
        assert best is not None
        return best[1], family.halves(*best[2], adapter.s)


def _floor(d: Tensor) -> Tensor:
    mean = d.mean()
    return d.clamp_min(1e-3 * float(mean)) / mean if mean > 0 else torch.ones_like(d)
