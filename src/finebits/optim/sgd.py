"""Stochastic gradient descent: A Stochastic Approximation Method.  Robbins & Monro, Annals of Mathematical Statistics 22(3), 1951.

    θ ← θ − η (g + λ θ)

torch computes it. State: none.
Deviations: the rate follows the schedule of the run; decay λ is torch's, which is part of the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from finebits.optim._family import Usual

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SGD(Usual):
    """torch's SGD without momentum.

    >>> SGD().state(1000)
    0
    """

    adaptive: ClassVar[bool] = False
    hf: ClassVar[str] = "sgd"
    label: ClassVar[str] = "SGD"
    rowwise: ClassVar[bool] = True

    def state(self, numbers: int) -> int:
        return 0

    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        from torch.optim import SGD as Torch

        return Torch(groups, lr=lr)
