"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models.  Büyükakyüz, 2024.  arXiv:2406.01775v1.

Factors from the QR decomposition of the weight (Alg. 1):

    Q R = W,    B = Q_{:, :r},  A = R_{:r},    W ← W − s·B A

Deviations: B and A are divided by √s, so that the same part is taken for every scale s: B's columns have the length 1/√s.
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
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class OLoRA(Init):
    """Nothing to choose: the rank is the adapter's.

    >>> W = torch.tensor([[3.0, 1.0], [0.0, 2.0]])  # a triangle is its own R
    >>> base, start = fb.OLoRA()(W, fb.LoRA(rank=1, alpha=1), torch.clone, {})
    >>> base, start["B"] @ start["A"]
    (tensor([[0., 0.], [0., 2.]]), tensor([[3., 1.], [0., 0.]]))
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True
    for_training: ClassVar[bool] = True

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "OLoRA")
        r, root = adapter.rank, adapter.s**0.5
        Q, R = torch.linalg.qr(W)
        B, A = Q[:, :r], R[:r]
        return quantize(W - B @ A), {"B": B / root, "A": A / root}
