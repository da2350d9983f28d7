"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (QPiSSA).  Meng, Wang, Zhang, NeurIPS 2024.  arXiv:2404.02948v4.

The adapter takes the principal part of W and the rest is quantized; with T > 1 the two are alternated (Alg. 1 of the supplement):

    B A = top-r SVD of W − Q_{t−1}  (Q_0 = 0),    Q_t = quant(W − B A),    t = 1 … T

Each step ends by quantizing, where LoftQ's ends with an SVD. Where no format quantizes (`quantize` is the identity) it is PiSSA.
Deviations: the best iterate is kept, not the last, by ‖W − Q − B A‖ (the paper reports the nuclear norm); factors are divided by √s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.linalg import top_svd
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class QPiSSA(Init):
    """T = `steps` alternations.

    >>> W = torch.tensor([[3.4, 0.0], [0.0, 1.3]])
    >>> Q, start = fb.QPiSSA()(W, fb.LoRA(rank=1, alpha=1), torch.round, {})
    >>> Q, start["B"] @ start["A"]  # the principal part, and the rest in whole numbers
    (tensor([[0., 0.], [0., 1.]]), tensor([[3.4000, 0.0000], [0.0000, 0.0000]]))
    """

    steps: int = 5
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Invalid(f"QPiSSA needs steps >= 1, not {self.steps}")

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "QPiSSA")
        best, E = None, W  # W − Q of the step before
        for _ in range(self.steps):
            svd = top_svd(E, adapter.rank)
            BA = family.product(svd)
            Q = quantize(W - BA)
            E = W - dense(Q, torch.float32)
            error = float((E - BA).norm())
            if best is None or error < best[0]:
                best = error, Q, svd
            if error == 0:
                break
        assert best is not None
        U, S, Vh, _ = best[2]
        return best[1], family.halves(U, S, Vh, adapter.s)
