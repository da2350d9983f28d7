"""IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning.  Zhang et al., 2023.  arXiv:2308.12043v1.
Use it where AdaLoRA's start at full rank costs too much learning: ranks grow where they are missed, instead of being cut where they are not.

Over adapters W + s·B diag(λ) A whose `rank` is what a matrix may get at most, each matrix starts with `start` open directions and one in
reserve, whose B and A already learn behind a fixed λ = 1e-5. Every `every` steps after the first `warmup`, until `target_rank` on average
is reached, the `top` matrices of the largest score open their reserve and take the next one:

    I = Σ_i |λ_i ∂L/∂λ_i| / √(m n),    Ī ← β Ī + (1 − β) I,    Ū ← β Ū + (1 − β) |I − Ī|,    S = Ī Ū
    loss += γ · mean over factors of ‖P Pᵀ − I‖, of the directions that learn

A direction's own warmup of `ramp` steps multiplies its steps, from when it becomes the reserve for B and A, and from when it opens for λ.
Deviations:
- I adds up |⟨ΔW_i, ∂L/∂W⟩| by direction, where the paper adds up |ΔW ∘ ∂L/∂W| by entry, for which the gradient of the whole weight would be
  needed;
- s stays what it is at birth, where the authors divide by the rank of the moment, so that opening one direction rescales no other;
- the budget is kept exactly, ties go by module name; nothing is appended to an optimizer: tensors have their final shape from the start,
  and a direction that does not learn yet is what it was to the bit.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run, Scene

RESERVE, NEVER = 1e-5, 1 << 62


class IncreLoRA(Rule):
    """Ranks grow from `start` to `target_rank` a host on average.

    >>> rule = fb.IncreLoRA(target_rank=4, start=1, warmup=10, every=5, top=2)
    >>> [rule.more(step, given=3, hosts=2) for step in (5, 10, 12, 15)], rule.more(15, given=7, hosts=2)  # 8 are to be given out
    ([0, 2, 0, 2], 1)
    """

    null: ClassVar[dict[str, Any]] = {"start": 2**31, "orthogonal": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate"})

    def __init__(
        self,
        target_rank: int = 8,
        start: int = 1,
        warmup: int = 20,
        every: int = 5,
        top: int = 8,
        ramp: int = 5,
        beta: float = 0.85,
        orthogonal: float = 0.1,
    ) -> None:
        if not (start >= 1 and every >= 1 and top >= 1 and ramp >= 1 and warmup >= 0):
            raise Invalid(f"IncreLoRA needs start, every, top and ramp of 1 or more; got {start}, {every}, {top} and {ramp}")
        self.target_rank, self.start, self.warmup, self.every, self.top = target_rank, start, warmup, every, top
        self.ramp, self.beta, self.orthogonal = ramp, beta, orthogonal
        self.mean: dict[str, float] = {}  # Ī
        self.spread: dict[str, float] = {}  # Ū
        self.learns: dict[str, Tensor] = {}  # the step since which B and A of every direction learn
        self.opened: dict[str, Tensor] = {}  # and the step at which it was opened
        self.before: dict[str, dict[str, Tensor]] = {}  # for the time of one step

    def more(self, step: int, given: int, hosts: int) -> int:
        """How many directions are opened after `step` steps, where `given` are open."""
        due = step >= max(self.warmup, 1) and (step - self.warmup) % self.every == 0
        return max(min(self.top, self.target_rank * hosts - given), 0) if due else 0

    def state(self, scene: Scene) -> int:
        return sum(16 * on.numbers("gate") for on in scene.adapters)

    def work(self, scene: Scene) -> int:
        """Tensors as they were before the optimizer's step, or earlier those that the penalty picks directions of."""
        picked = family.departures(scene) + sum(4 * on.numbers("A", "B") for on in scene.adapters)
        return max(sum(4 * on.numbers("A", "B", "gate") for on in scene.adapters), picked if self.orthogonal else 0)

    @torch.no_grad()
    def before_forward(self, run: Run) -> None:
        if self.opened:
            return
        for name, p in family.tensors(run, self).items():
            rank = torch.arange(p["gate"].numel())
            self.opened[name] = torch.where(rank < self.start, -self.ramp, NEVER)
            self.learns[name] = torch.where(rank <= self.start, -self.ramp, NEVER)
            if self.start < len(rank):
                p["gate"][self.start :] = 0.0
                p["gate"][self.start] = RESERVE

    def penalty(self, run: Run) -> Tensor | float:
        if not self.orthogonal:
            return 0.0
        learn = {name: self.learns[name] <= run.step for name in self.learns}
        tensors = family.tensors(run, self).items()
        terms = [family.departure(P[learn[name].to(P.device)]) for name, p in tensors for P in (p["A"], p["B"].mT)]
        return self.orthogonal * torch.stack(terms).mean()

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        tensors = family.tensors(run, self)
        held = {name: p for name, p in tensors.items() if bool((self._share(self.opened[name], run.step + 1) < 1).any())}
        self.before = {name: {k: p[k].clone() for k in self.needs} for name, p in held.items()}
        for name, p in tensors.items():
            if p["gate"].grad is None:
                raise Invalid(f"IncreLoRA found no gradient for {name}.gate: every gated adapter must be trained")
            m, n = p["B"].shape[0], p["A"].shape[1]
            I = float((p["gate"] * p["gate"].grad).abs().sum()) / math.sqrt(m * n)  # noqa: E741
            self.mean[name] = self.beta * self.mean.get(name, 0.0) + (1 - self.beta) * I
            self.spread[name] = self.beta * self.spread.get(name, 0.0) + (1 - self.beta) * abs(I - self.mean[name])

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        tensors = family.tensors(run, self)
        for name, old in self.before.items():
            p = tensors[name]
            f = self._share(self.learns[name], run.step).to(p["A"])
            p["A"].copy_(old["A"].lerp(p["A"], f[:, None]))
            p["B"].copy_(old["B"].lerp(p["B"], f))
            p["gate"].copy_(old["gate"].lerp(p["gate"], self._share(self.opened[name], run.step).to(f)))
        self.before = {}
        given = sum(int((opened != NEVER).sum()) for opened in self.opened.values())
        room = [name for name, opened in self.opened.items() if bool((opened == NEVER).any())]
        by_score = sorted(room, key=lambda name: (-self.mean[name] * self.spread[name], name))
        for name in by_score[: self.more(run.step, given, len(tensors))]:
            i = int((self.opened[name] != NEVER).sum())
            self.opened[name][i] = run.step
            if i + 1 < len(self.opened[name]):
                self.learns[name][i + 1] = run.step
                tensors[name]["gate"][i + 1] = RESERVE

    def _share(self, since: Tensor, step: int) -> Tensor:
        """Of a step that is made, by direction: 0 before it learns, 1 from `ramp` steps on."""
        return ((step - since).double() / self.ramp).clamp(0, 1)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "spread": self.spread, "learns": self.learns, "opened": self.opened}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.spread = dict(state["mean"]), dict(state["spread"])
        self.learns, self.opened = ({k: v.clone() for k, v in state[name].items()} for name in ("learns", "opened"))
