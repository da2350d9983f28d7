"""LoRA-SB: Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning.
Ponkshe et al., 2024.  arXiv:2411.19557v4.

A start of LoRA-XS (B and A frozen, R trained) from an estimate of full fine-tuning's first AdamW step (Alg. 1):

    ΔW = −η·sign(G),    U Σ Vᵀ = SVD(ΔW),    B = U_r,  A = Vᵀ_r,  R = Σ_r / s

W is not compensated: the model starts with the first step taken, so exact is False.
Deviations: η is the step itself ("lr"), where the code derives it from the length of its calibration loader; R is divided by s, where the
paper sets α = r; a block Krylov SVD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.linalg import top_svd
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.grad import Grad


@dataclass(frozen=True)
class LoRASB(Init):
    """η, the size of the first step in every weight.

    >>> grad = fb.Grad()
    >>> grad.add(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> base, start = fb.LoRASB(lr=0.5)(torch.eye(2), fb.LoRAXS(rank=1, alpha=1), torch.clone, {fb.Grad: grad})
    >>> start["B"] @ start["R"] @ start["A"]  # −lr · sign(G)
    tensor([[-0.5000, -0.5000], [-0.5000, -0.5000]])
    """

    lr: float = 5e-5
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Grad})
    exact: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    for_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise Invalid(f"lr is {self.lr}; it must be positive")

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "LoRASB")
        G = family.gradient(need(stats, Grad, "LoRASB"), W, "LoRASB")
        U, S, Vh, _ = top_svd(-self.lr * G.sign(), adapter.rank)
        return quantize(W), {"B": U, "A": Vh, "R": S.diag() / adapter.s}
