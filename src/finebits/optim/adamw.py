"""AdamW: Decoupled Weight Decay Regularization.  Loshchilov & Hutter, ICLR 2019.  arXiv:1711.05101v3.

With gradient g at step t, rate η and decay λ:

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²
    θ ← θ − η λ θ − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

torch computes it. State: m and v in float32, eight bytes a number.
Deviations: none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from finebits.optim._family import Usual

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdamW(Usual):
    """torch's AdamW.

    >>> AdamW().state(1000)  # bytes of 1000 trained numbers
    8000
    """

    hf: ClassVar[str] = "adamw_torch"
    same: ClassVar[tuple[str, ...]] = ("adamw_torch_fused",)
    rowwise: ClassVar[bool] = True
    smaller: ClassVar[str | None] = "adamw_8bit"

    def state(self, numbers: int) -> int:
        return 8 * numbers

    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        from torch.optim import AdamW as Torch

        return Torch(groups, lr=lr, betas=betas, eps=eps)
