"""NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models.  Guo et al., 2025.  arXiv:2502.14482v1.

A start of the adapter `slora` from the first rows and columns of W, without any SVD (section 3.2):

    W ≈ C W_rr⁺ R,    C = W_{:, :r},  R = W_{:r},  W_rr = W_{:r, :r};    B = C,  N = W_rr⁺,  A = R

middle="corner" is the released code's N = W_rr. The approximation is exact where W and W_rr are of one rank ≤ r.
Deviations: W ← W − s·B N A, so that the start is W (the authors leave W as it is); N is divided by s; singular values of W_rr below 1 % of
the largest count as zero, since the inverse of a Gaussian corner would make the product tens of times as large as W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.init import _family as family
from finebits.init.base import Quantize
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class NLoRA:
    """`middle` is "pinv" (the paper's) or "corner" (the released code's)."""

    middle: Literal["pinv", "corner"] = "pinv"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True
    for_training: ClassVar[bool] = True

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "NLoRA")
        r = adapter.rank
        B, A, N = W[:, :r], W[:r], W[:r, :r]
        if not (A.any() and B.any()):
            return quantize(W), {}  # rows and columns that are nothing: the adapter is born as it likes
        if self.middle == "pinv":
            N = torch.linalg.pinv(N, rtol=0.01)
        return quantize(W - B @ N @ A), {"B": B.clone(), "N": N / adapter.s, "A": A.clone()}
