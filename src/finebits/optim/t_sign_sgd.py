"""t-SignSGD, of LoTA-QAF: Lossless Ternary Adaptation for Quantization-Aware Fine-Tuning.  Chen et al., NeurIPS 2025.  arXiv:2505.18724v2.

Of a ternary tensor those entries step whose gradients are the largest, by one whole step each:

    θ ← clamp(θ − sign(g) · 1[|g| > max(τ, Q_{1−η}(|g|))], −1, 1),    τ = 10⁻⁹

Q is the quantile over the tensor: the share η of its entries moves. State: none.
Deviations: the authors give the share that stays by a schedule of its own, from 95 % to 99.9 % over four fifths of the steps and to 99.99 %
after; here η is the rate of the run under its schedule, so that a rate of 0.05 that falls to 0 is close to that. Their bound on abnormal
gradients late in training is left out (the run clips norms), and so is decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from finebits.errors import Invalid
from finebits.optim._family import Usual, evaluated

TAU = 1e-9


@dataclass(frozen=True)
class TSignSGD(Usual):
    """Whole steps of the entries with the largest gradients; the rate is their share.

    >>> W = torch.nn.Parameter(torch.tensor([0.0, 1.0, -1.0, 0.0]))
    >>> W.grad = torch.tensor([3.0, -2.0, 0.1, 0.2])
    >>> TSignSGD().make([W], lr=0.5).step()
    >>> W.data  # half of them: the first steps down, and the second is at its end
    tensor([-1.,  1., -1.,  0.])
    """

    adaptive: ClassVar[bool] = False
    label: ClassVar[str] = "t-SignSGD"
    only: ClassVar[str | None] = "lota"

    def state(self, numbers: int) -> int:
        return 0

    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        made = _Steps(groups, {"lr": lr, "weight_decay": 0.0})
        if not 0 <= lr <= 1:
            raise Invalid(f"the rate of t_sign_sgd is the share of entries that step, of 0 to 1, and {lr} came")
        for group in made.param_groups:
            for p in group["params"]:
                if not bool(((p == 0) | (p.abs() == 1)).all()):
                    raise Invalid(
                        f"t_sign_sgd steps tensors of -1, 0 and 1, and one of {tuple(p.shape)} has other numbers: train the adapter lota, or "
                        "take another training.optim"
                    )
        return made


class _Steps(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = evaluated(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not (many := int(group["lr"] * p.numel())):
                    continue
                size = p.grad.abs().float().flatten()
                least = size.kthvalue(len(size) - many).values if many < len(size) else size.new_zeros(())
                moves = (size > least.clamp(min=TAU)).view_as(p)
                p.sub_(p.grad.sign() * moves).clamp_(-1, 1)
        return loss
