"""LoRA-MGPO: Mitigating Double Descent in Low-Rank Adaptation via Momentum-Guided Perturbation Optimization.  Chang et al., EMNLP 2025.
arXiv:2502.14538v3.
Use it where lora's loss swings with a high rank and the optimizer has momentum: gradients are taken at a point that is moved along it.

While training, the weight of every adapted layer l is W′ + ε, with v the optimizer's momentum m as it moves the weight, and ḡ a running
norm:

    ε = −ρ (v / ‖v‖) / ḡ,    v = (dL) R + L (dR) along m,   which for lora is s (m_B A + B m_A)
    ḡ ← β ḡ + (1 − β) ‖g‖,   g the same along the step's gradients;   the first ‖g‖ is ḡ itself

ε is a product of rank 2 r and is never formed.
Deviations: 1/ḡ is at most 10, as in the authors' code, of which the paper says nothing; ḡ is updated once an optimizer step, by the
gradients of all micro-batches after clipping, where the code does so with every micro-batch.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from finebits.adapters.base import Form
from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run, Scene

MOST = 10.0  # of 1/ḡ
MOMENTA = ("exp_avg", "momentum_buffer")


class MGPO(Rule):
    """ρ and β: .05 and .9 for models like T5-base, .01 and .8 for LLaMA-2-7B.

    >>> rule = fb.MGPO(rho=0.05)
    >>> rule.length(gradient=0.5), round(rule.length(gradient=0.01), 3)  # .05 / .5, and at most ten times .05
    (0.1, 0.5)
    """

    null: ClassVar[dict[str, Any]] = {"rho": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    forms: ClassVar[frozenset[Form]] = frozenset({"product"})

    def __init__(self, rho: float = 0.05, beta: float = 0.9) -> None:
        if not (rho >= 0 and 0 <= beta < 1):
            raise Invalid(f"MGPO needs rho >= 0, and beta from 0 to below 1; got {rho} and {beta}")
        self.rho, self.beta = rho, beta
        self.gradients: dict[str, float] = {}  # ḡ
        self.span = contextlib.ExitStack()

    def length(self, gradient: float) -> float:
        """‖ε‖ where ḡ is `gradient`."""
        return self.rho * min(1 / max(gradient, 1e-12), MOST)

    def work(self, scene: Scene) -> int:
        """P and Q of all adapters."""
        return sum(8 * family.rank(on) * (on.m + on.n) for on in scene.adapters) if self.rho else 0

    @torch.no_grad()
    def before_forward(self, run: Run) -> None:
        self.span.close()
        if not self.rho or run.step == 0:  # when no optimizer has any momentum
            return
        for name, host, adapter, p in family.adapters(run, self):
            P, Q = family.tangent(adapter, p, _momenta(run, p))
            norm = float(family.squares(P, Q).sum().sqrt())
            if norm > 0:
                P = P * (-self.length(self.gradients[name]) / norm)
                family.adding(
                    self.span, host, lambda x, out, P=P, Q=Q: F.linear(F.linear(x.to(out.dtype), Q.to(out.dtype)), P.to(out.dtype))
                )

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        self.span.close()
        for name, _, adapter, p in family.adapters(run, self) if self.rho else ():
            got = {k: t.grad for k, t in p.items() if t.grad is not None}
            now = float(family.squares(*family.tangent(adapter, p, got)).sum().sqrt())
            self.gradients[name] = self.beta * self.gradients.get(name, now) + (1 - self.beta) * now

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self.gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gradients = dict(state["gradients"])


def _momenta(run: Run, p: family.Tensors) -> dict[str, Tensor]:
    """The optimizer's, of every trained tensor."""
    if run.optimizer is None:
        raise Invalid("MGPO goes along the momentum of the optimizer, and the run has none")
    found = {}
    for k, t in p.items():
        state = run.optimizer.state.get(t, {}) if t.requires_grad else {}
        m = next((state[name] for name in MOMENTA if state.get(name) is not None), None)
        if t.requires_grad and m is None:
            raise Invalid("MGPO goes along the momentum of the optimizer, and this one keeps none in floats: take training.optim adamw")
        if m is not None:
            found[k] = m
    return found
