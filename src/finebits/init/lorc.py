"""ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats (LoRC).
Wu, Yao, He, 2023.  arXiv:2307.09782v2.

The quantization error's best low-rank part, added back (section 4, "low rank compensation"):

    Q = quant(W),    U Σ V = SVD(W − Q),    B = U_r Σ_r^½,  A = Σ_r^½ V_r

Deviations: the factors are divided by √s, so that s·B A is the compensation for every scale s of the adapter; they are not quantized
themselves, since they will be trained. With RTN this is LoftQ's first step; with GPTQ (the paper's) the quantizer calibrates and the
compensation does not: qera.py does both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.linalg import top_svd
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class LoRC(Init):
    """Nothing to choose: the rank is the adapter's.

    >>> W = torch.tensor([[1.4, 0.0], [0.0, 1.3]])
    >>> Q, start = fb.LoRC()(W, fb.LoRA(rank=1, alpha=1), torch.round, {})
    >>> Q, start["B"] @ start["A"]  # the larger of what whole numbers lose
    (tensor([[1., 0.], [0., 1.]]), tensor([[0.4000, 0.0000], [0.0000, 0.0000]]))
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = False

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "LoRC")
        Q = quantize(W)
        U, S, Vh, _ = top_svd(W - dense(Q, torch.float32), adapter.rank)
        return Q, family.halves(U, S, Vh, adapter.s)
