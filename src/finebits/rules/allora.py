"""ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws.  Huang & Balestriero, 2024.  arXiv:2410.09692v1.
Use it for short runs of lora with alpha = rank and without dropout: rows of the update that are still near zero learn faster.

With ρ_i = ‖(B A)_i‖ of row i of the update, the gradient that comes back through output i of the adapter is multiplied by

    κ_i = (ρ_i + 1/η²)^(−½)                η at birth, where B = 0

"gradient" does this: rows of ∂L/∂B become κ_i times what they were, and ∂L/∂A is s·Bᵀ diag(κ) ∂L/∂W, as is what goes on to the layers
before. An optimizer that normalises gradients (Adam) undoes a constant factor on B's rows, so "rate" multiplies the step of row i of B by
κ_i instead, after the optimizer. ρ is of the moment before the forward, taken without forming B A.
Deviations: `power` ½ may be another; "rate" is this project's.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Form
from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run, Scene


class ALLoRA(Rule):
    """`eta` is the factor at birth, `power` 0 is LoRA as it is.

    >>> rule = fb.ALLoRA(eta=2.0)
    >>> rule.kappa(torch.zeros(2, 1), torch.ones(1, 3)), rule.kappa(torch.tensor([[3.75]]), torch.ones(1, 1))  # 1 / √(3.75 + ¼)
    (tensor([2., 2.]), tensor([0.5000]))
    """

    null: ClassVar[dict[str, Any]] = {"power": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    forms: ClassVar[frozenset[Form]] = frozenset({"product"})
    drops: ClassVar[bool] = False

    def __init__(self, eta: float = 2.0, power: float = 0.5, mode: Literal["gradient", "rate"] = "gradient") -> None:
        if not (eta > 0 and power >= 0):
            raise Invalid(f"ALLoRA needs eta above 0 and power of 0 or more; got {eta} and {power}")
        if mode not in ("gradient", "rate"):
            raise Invalid(f"ALLoRA's mode is gradient or rate, not {mode!r}")
        self.eta, self.power, self.mode = eta, power, mode
        self.span = contextlib.ExitStack()
        self.held: dict[str, tuple[Tensor, Tensor]] = {}  # B before the step and κ, for the time of one step

    def kappa(self, L: Float[Tensor, "m r"], R: Float[Tensor, "r n"]) -> Float[Tensor, " m"]:
        """κ of every row of L R."""
        return (family.squares(L, R).sqrt() + self.eta**-2).pow(-self.power)

    def work(self, scene: Scene) -> int:
        """κ, and beside it B as it was, or κ − 1."""
        if not self.power:
            return 0
        return sum(4 * on.m + (4 * on.numbers("B") if self.mode == "rate" else scene.width * on.m) for on in scene.adapters)

    def per_token(self, scene: Scene) -> int:
        """What lies between the two factors, once more."""
        counts = self.power and self.mode == "gradient"
        return sum(scene.width * family.rank(on) for on in scene.adapters) if counts else 0

    @torch.no_grad()
    def before_forward(self, run: Run) -> None:
        self.span.close()
        for name, host, adapter, p in family.adapters(run, self) if self.power else ():
            kappa = self.kappa(*family.factors(adapter, p))
            if self.mode == "rate":
                self.held[name] = p["B"].clone(), kappa
            else:
                family.adding(self.span, host, _missing(adapter, p, kappa))

    def after_backward(self, run: Run) -> None:
        self.span.close()

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for name, _, _, p in family.adapters(run, self) if self.held else ():
            before, kappa = self.held[name]
            p["B"].copy_(before + kappa[:, None] * (p["B"] - before))
        self.held = {}


def _missing(adapter: Any, p: family.Tensors, kappa: Tensor) -> family.Hook:
    """Zero, whose gradient is what the adapter's own lacks: κ − 1 times as much."""

    def more(x: Tensor, out: Tensor) -> Tensor:
        L, R = family.factors(adapter, {k: v.to(out.dtype) for k, v in p.items()})
        return Backward.apply(F.linear(F.linear(x.to(out.dtype), R), L), (kappa - 1).to(out.dtype))  # pyright: ignore[reportReturnType]

    return more


class Backward(torch.autograd.Function):
    """Zero forwards; the gradient times `scale` backwards."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(scale)
        return torch.zeros_like(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (scale,) = ctx.saved_tensors
        return grads[0] * scale, None
