"""Lion: Symbolic Discovery of Optimization Algorithms.  Chen et al., NeurIPS 2023.  arXiv:2302.06675v4.

With gradient g, rate η and decay λ, of which the paper takes a third to a tenth and three to ten times what it gives AdamW:

    θ ← θ − η (sign(β₁ m + (1 − β₁) g) + λ θ)
    m ← β₂ m + (1 − β₂) g

State: m, four bytes a number where weights are float32.
Deviations: none. β₁ and β₂ are its own, never those that a recipe gives Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from finebits.errors import Invalid
from finebits.optim._family import Usual, evaluated


@dataclass(frozen=True)
class Lion(Usual):
    """The sign of a momentum.

    >>> W = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> W.grad = torch.tensor([100.0, -0.01])
    >>> Lion().make([W], lr=0.5).step()
    >>> W.data  # a step of one length in every direction
    tensor([0.5000, 1.5000])
    """

    beta1: float = 0.9
    beta2: float = 0.99
    adaptive: ClassVar[bool] = False
    hf: ClassVar[str] = "lion_32bit"
    label: ClassVar[str] = "Lion"
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise Invalid(f"lion's beta1 and beta2 are {self.beta1:g} and {self.beta2:g}: shares from 0 up to (not including) 1 are wanted")

    def state(self, numbers: int) -> int:
        return 4 * numbers

    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        return _Signs(groups, {"lr": lr, "betas": (self.beta1, self.beta2), "weight_decay": 0.0})


class _Signs(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = evaluated(closure)
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"]).add_(m.lerp(p.grad, 1 - beta1).sign_(), alpha=-lr)
                m.lerp_(p.grad, 1 - beta2)
        return loss
