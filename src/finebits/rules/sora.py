"""SoRA: Sparse Low-rank Adaptation of Pre-trained Language Models.  Ding et al., EMNLP 2023.  arXiv:2311.11696v1.
Use it where the rank that each matrix needs is not known: one starts high, and gates that are not worth their price become zero.

Over adapters W + s·B diag(g) A, after every step of the optimizer the gates (and nothing else) go through the proximal map of ξ‖g‖₁:

    g ← T_ξ(g),    T_ξ(g) = sign(g) max(|g| − ξ, 0),    ξ = η λ                          (eqs. 6 to 8)
    loss += l1 · Σ |g| / number of gates                                                  (the authors' code, beside the paper)

A gate that is zero has a gradient and may come back. Along a schedule λ grows in `stages` equal parts of the run, from 0 to `threshold`.
Deviations:
- the authors' code subtracts ξ and then zeroes what is below ξ, which kills gates up to 2ξ; this is T_ξ of the paper;
- the authors' code leaves η out in one place: `scaled=False`, for which the published ξ (3e-4) are meant, and under which a falling rate
makes   the price dearer; the default is the paper's η λ, with λ = .4, which is 3e-4 at their rate of 8e-4;
- the paper's log and exponential schedules are given by name alone: here ln(1 + (e − 1) u) and (eᵘ − 1) / (e − 1) of the share u of the
stages;
- gates start as the adapter has them (0, or 1 under an initialiser), where the authors draw them from a Gaussian and start B at 0.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run

SCHEDULES = {
    "constant": lambda u: 1.0,
    "linear": lambda u: u,
    "log": lambda u: math.log1p((math.e - 1) * u),
    "exp": lambda u: math.expm1(u) / (math.e - 1),
}


class SoRA(Rule):
    """`threshold` is λ, or ξ itself where it is not `scaled` by the learning rate.

    >>> rule = fb.SoRA(threshold=0.6, schedule="linear", stages=3)
    >>> [rule.price(step, total=30) for step in (1, 10, 11, 30)]  # of the steps 1 to 10, 11 to 20, and the rest
    [0.0, 0.0, 0.3, 0.6]
    """

    null: ClassVar[dict[str, Any]] = {"threshold": 0.0, "l1": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"gate"})

    def __init__(
        self,
        threshold: float = 0.4,
        scaled: bool = True,
        schedule: Literal["constant", "linear", "log", "exp"] = "constant",
        stages: int = 7,
        l1: float = 0.0,
    ) -> None:
        if not (threshold >= 0 and l1 >= 0 and stages >= 2):
            raise Invalid(f"SoRA needs threshold >= 0, l1 >= 0 and 2 stages or more; got {threshold}, {l1} and {stages}")
        if schedule not in SCHEDULES:
            raise Invalid(f"SoRA has no schedule {schedule!r}: {', '.join(SCHEDULES)}")
        self.threshold, self.scaled, self.schedule, self.stages, self.l1 = threshold, scaled, schedule, stages, l1

    def price(self, step: int, total: int) -> float:
        """λ of the step that comes as number `step`, from 1."""
        stage = min((step - 1) * self.stages // max(total, 1), self.stages - 1)
        return self.threshold * SCHEDULES[self.schedule](stage / (self.stages - 1))

    def factors(self, run: Run) -> dict[nn.Parameter, dict[str, float]]:
        """No decay beside the prox."""
        gates = [p["gate"] for p in family.tensors(run, self).values()] if self.threshold else []
        return {gate: {"weight_decay": 0.0} for gate in gates}

    def penalty(self, run: Run) -> Tensor | float:
        if not self.l1:
            return 0.0
        gates = torch.cat([p["gate"] for p in family.tensors(run, self).values()])
        return self.l1 * gates.abs().mean()

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        xi = self.price(run.step, run.total)
        if not xi:
            return
        for p in family.tensors(run, self).values():
            gate = p["gate"]
            gate.copy_(family.soft(gate, xi * family.rate(run, gate, "SoRA") if self.scaled else xi))
