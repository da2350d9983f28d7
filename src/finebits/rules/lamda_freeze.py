"""LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation (gradual freezing).  Azizi et al., EMNLP 2024.
arXiv:2406.12832v1.
Use it with adapter slora, train="left": the second factor stops learning column by column, and its optimizer state goes.

Over adapters W + s·B N A whose A is frozen from the start, the columns of B follow one by one, those of the largest singular values first,
until at t_f = η·T none is left and N alone is trained:

    columns 0 … ⌊r·t / t_f⌋ − 1 of B are frozen from step t on

Init `lamda` puts the columns in that order. A frozen column is what it was to the bit, whatever the optimizer's momentum and weight decay
ask for; when all are frozen, B has no gradient any more and the optimizer lets go of its state.
Deviations: the authors' code leaves out the factor r, so that three columns at most are ever frozen, and zeroes gradients alone, which
momentum ignores; where gradients are clipped, their norm counts a frozen column's.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run, Scene


class LaMDAFreeze(Rule):
    """η, the share of the run after which B is frozen.

    >>> [fb.LaMDAFreeze(eta=0.5).columns(step, total=100, rank=4) for step in (0, 25, 50)]
    [0, 2, 4]
    """

    null: ClassVar[dict[str, Any]] = {"eta": math.inf}
    needs: ClassVar[frozenset[str]] = frozenset({"B", "N"})

    def __init__(self, eta: float = 0.3) -> None:
        if not eta > 0:
            raise Invalid(f"LaMDAFreeze needs eta above 0, not {eta}: at 0 nothing but the core would be trained, as slora train=core does")
        self.eta = eta
        self.kept: dict[str, Tensor] = {}  # frozen columns, for the time of one step

    def columns(self, step: int, total: int, rank: int) -> int:
        """How many columns are frozen once `step` steps are done."""
        return min(rank, math.floor(rank * step / (self.eta * max(total, 1))))

    def work(self, scene: Scene) -> int:
        """Columns of B as they were, all but one at most: where all are frozen, nothing moves them."""
        return sum(4 * (on.numbers("B") - on.m) for on in scene.adapters)

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        self.kept = {}
        for name, p in family.tensors(run, self).items():
            B = p["B"]
            k = self.columns(run.step, run.total, B.shape[1])
            if k == B.shape[1]:
                B.grad = None
                if run.optimizer is not None:
                    run.optimizer.state.pop(B, None)
            elif k:
                self.kept[name] = B[:, :k].clone()

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for name, columns in self.kept.items():
            host, _, adapter = name.rpartition(".")
            run.hosts[host].p[adapter]["B"][:, : columns.shape[1]] = columns
        self.kept = {}
