"""NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models.  Guo et al., 2025.  arXiv:2502.14482v1.

A start of the adapter `slora` from the first rows and columns of W, without an SVD of W (section 3.2):

    W ≈ C N R,    C = W_{:, :r},  R = W_{:r},  W_rr = W_{:r, :r};    B = C,  A = R,  W ← W − s·B N A

middle="pinv" is the paper's N = W_rr⁺, "corner" the released code's N = W_rr, and "fit", the default, the N that leaves the least of W:

    N = argmin ‖W − C N R‖ = C⁺ W R⁺

The two are the same where W and W_rr are of one rank ≤ r. Elsewhere the inverse of a Gaussian corner makes B N A tens of times as long as W:
then "pinv" leaves a remainder that no quantizer may round, and it is refused over one that loses anything.
Deviations: "fit" is not in the paper; W − s·B N A is the base, so that the start is W (the authors leave W as it is); N is divided by s;
singular values below 1e-5 of the largest count as zero.
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
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class NLoRA(Init):
    """`middle` is "fit" (least squares), "pinv" (the paper's) or "corner" (the released code's).

    >>> W = torch.tensor([[1.0, 2.0], [2.0, 4.0]])  # of rank one: its first column times its first row
    >>> base, start = fb.NLoRA()(W, fb.SLoRA(rank=1, alpha=1), torch.clone, {})
    >>> base, start["N"]
    (tensor([[0., 0.], [0., 0.]]), tensor([[1.]]))
    """

    middle: Literal["fit", "pinv", "corner"] = "fit"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True
    for_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.middle not in ("fit", "pinv", "corner"):
            raise Invalid(f"middle is {self.middle!r}; it can be 'fit', 'pinv' (the paper's) or 'corner' (the released code's)")

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "NLoRA")
        r = adapter.rank
        B, A, N = W[:, :r], W[:r], W[:r, :r]
        if not (A.any() and B.any()):
            return quantize(W), {}  # rows and columns that are nothing: the adapter is born as it likes
        if self.middle == "pinv":
            N = _inverse(N).float()
        elif self.middle == "fit":
            N = (_inverse(B) @ W.double() @ _inverse(A)).float()
        left = W - B @ N @ A
        Q = quantize(left)
        longer = float(left.norm() / W.norm())
        if longer > 1.01 and self.middle == "pinv" and not torch.equal(dense(Q, torch.float32), left):
            raise Invalid(
                f"NLoRA(middle='pinv') leaves {longer:.3g} times the weight's norm to quantize, so that its start would be far from the "
                "weight: take middle='fit', or keep the weight dense"
            )
        return Q, {"B": B.clone(), "N": N / adapter.s, "A": A.clone()}


def _inverse(M: Float[Tensor, "p q"]) -> Float[Tensor, "q p"]:
    return torch.linalg.pinv(M.double(), rtol=1e-5)
