"""KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models.  Wang et al., ICLR 2025.  arXiv:2412.06071v2.

The r smallest singular components are taken for noise and dropped (eq. 5), and the update has the form of an SVD (eq. 6), k = min(m, n):

    W_t = Σ_{i ≤ k−r} σ_i u_i v_iᵀ,    W′ = W_t + s·B diag(σ) A,    B = 0, σ ~ N(0, 1), A uniform in ±1/√n (Kaiming, a = √5)

It is a start of the adapter `gated`, whose gates are σ. The start is W_t, not W: exact is False. The penalties on σ, B and A are
rule `kasa_loss`.
Deviations: k − r components are kept, where the code keeps n − r and so drops nothing when n > m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.linalg import top_svd
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class KaSA(Init):
    """Nothing to choose: as many components are dropped as the adapter has rank.

    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> base, start = fb.KaSA()(W, fb.Gated(rank=1, alpha=1), torch.clone, {})
    >>> base, sorted(start)  # the smallest component is gone
    (tensor([[3., 0.], [0., 0.]]), ['A', 'B', 'gate'])
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = False
    moves: ClassVar[bool] = True
    for_training: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def __call__(
        self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats, gen: torch.Generator | None = None
    ) -> tuple[Tensor, Params]:
        W, gen = W.float(), gen or torch.Generator().manual_seed(0)
        family.check(W, adapter, "KaSA")
        (m, n), r = W.shape, adapter.rank
        U, S, Vh, _ = top_svd(W, min(m, n), exact=True)
        start = {
            "A": (torch.rand(r, n, generator=gen) * 2 - 1) / math.sqrt(n),
            "gate": torch.randn(r, generator=gen),
            "B": torch.zeros(m, r),
        }
        return quantize(W - U[:, -r:] * S[-r:] @ Vh[-r:]), {k: v.to(W.device) for k, v in start.items()}
