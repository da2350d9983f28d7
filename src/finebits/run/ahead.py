"""What a run would do, before it does any of it: steps, tokens, evaluations, arithmetic, and the least time that this takes here.

A token that is trained on goes through every planned weight once forward, once backward to its inputs (the weights are frozen) and, under
checkpointing, once more forward: 2 floating-point operations a weight each time. A labelled place meets the head twice. Attention, what adapters
and rules add, and unpacking of codes are left out, so that the time is a lower end.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from finebits.plan.base import Plan
from finebits.plan.levers import Levers
from finebits.recipe import Recipe
from finebits.run.material import Material
from finebits.tasks.base import Task
from finebits.train import met


@dataclass(frozen=True)
class Ahead:
    """Of the recipe's own run: optimizer steps, rows of one, tokens with and without padding, labels, evaluations, operations, and the rules
    whose work is not among these."""

    steps: int
    rows: int
    tokens: int
    padded: int
    labels: int
    evaluations: int
    operations: float
    epochs: float = 1.0
    rules: tuple[str, ...] = ()

    def lines(self, speed: float | None) -> list[str]:
        """In words; `speed` in operations a second, None where it cannot be measured here.

        >>> Ahead(10, 4, 700, 800, 300, 0, 2e12).lines(1e11)[1]
        'at least 20 s of training: 2,000 GFLOP at the 100 GFLOP/s of a matrix product here'
        """
        each = f", {self.tokens / self.steps:,.0f} a step" if self.steps > 1 else ""
        often = f"; {self.evaluations} evaluations on held-out rows" if self.evaluations else ""
        would = (
            f"would train {self.steps:,} steps of {self.rows:,} rows: {self.tokens:,} tokens ({self.padded:,} with padding{each}), "
            f"{self.labels:,} trained{often}"
        )
        if speed is None:
            return [would]
        seconds = self.operations / speed
        an_epoch = "" if math.isclose(self.epochs, 1.0) else f", {_span(seconds / self.epochs)} an epoch"
        return [
            would,
            f"at least {_span(seconds)} of training{an_epoch}: {self.operations / 1e9:,.0f} GFLOP at the {speed / 1e9:,.0f} GFLOP/s of a "
            "matrix product here",
            *([f"not counted in it: the rule{'s' * (len(self.rules) > 1)} {', '.join(self.rules)}"] if self.rules else []),
        ]


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def every(often: float, steps: int) -> int:
    """Steps between two evaluations of a run of so many, as transformers rounds a share of them.

    >>> every(100, 940), every(0.25, 10)
    (100, 3)
    """
    return int(often) if often >= 1 else math.ceil(steps * often)


def ahead(recipe: Recipe, plan: Plan, material: Material, task: Task) -> Ahead:
    """What one process would do; several do it faster."""
    t, levers, objective = recipe.training, plan.levers, recipe.objective_value()
    size, passes = levers.per_device_train_batch_size, levers.gradient_accumulation_steps
    units = material.units(recipe.data)
    long, labelled = [task.tokens(n) for n in units.lengths], units.labelled
    each = math.ceil(math.ceil(len(long) / size) / passes)  # steps of an epoch
    steps = t.max_steps if t.max_steps > 0 else math.ceil(t.num_train_epochs * each)
    together = 1 if objective is None else objective.together
    batches = met(long, size, t.seed, passes, t.max_steps, t.num_train_epochs, together)
    padded = sum(len(b) * levers.padded(max(long[r] for r in b)) for b in batches)
    labels = sum(labelled[r] for b in batches for r in b)
    weights = sum(math.prod(cost["shape"]) for cost in plan.costs.values())
    geometry = plan.sizes.get("geometry")
    head = 0 if geometry is None else geometry["vocabulary"] * geometry["observed"]["hidden"]
    operations = 2.0 * weights * padded * (3 if levers.gradient_checkpointing else 2) + 4.0 * head * labels
    often = {"no": 0, "steps": steps // every(t.eval_steps, steps), "epoch": math.ceil(steps / each)}[t.eval_strategy] + t.eval_on_start
    rules = tuple(type(rule).__name__ for rule in recipe.rule_values())
    return Ahead(steps, size * passes, sum(long[r] for b in batches for r in b), padded, labels, often, operations, steps / each, rules)


def speed(levers: Levers) -> float | None:
    """Floating-point operations a second of a product of matrices, as it is now; None where the device is not here."""
    import torch

    device, half = levers.device, levers.inner < 4
    if device == "cuda" and not torch.cuda.is_available():
        return None
    n = 4096 if device == "cuda" else 768
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if half else torch.float32)
    torch.matmul(a, a)
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.2:
        torch.matmul(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        done += 1
    return 2.0 * n**3 * done / (time.perf_counter() - begun)
