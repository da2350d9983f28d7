"""ReLoRA: High-Rank Training Through Low-Rank Updates.  Lialin et al., ICLR 2024.  arXiv:2307.05695v4.
Use it for long runs whose update needs a higher rank than memory for gradients and momenta allows: one low-rank update after the other is
trained, and their sum has the sum of their ranks.

Every K steps, over adapters W + s·(B A + B₀ A₀) of kind `restarted`:

    B₀ A₀ ← B₀ A₀ + B A   (into room that was there from the start),    A ← new,  B ← 0
    the optimizer's moments of A and B: all but the largest 1 − prune of them ← 0
    the learning rate rises from 0 again over `warmup` steps, under the run's own schedule

Deviations: the paper adds B A to W. A quantized W would be rounded again, which loses a part of every update, and a dense one would be
another base than the one that adapters, checkpoints and exports refer to; so finished updates are kept as what they are, frozen, exactly,
at 4 bytes a number (gradients and momenta, which are three times as much, are those of one update alone), and an export is a lora of rank
(slots + 1) r. The paper starts with a stretch of full training, which a frozen base has not.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from finebits.adapters.base import Form
from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run


class ReLoRA(Rule):
    """A new start every `every` steps; 0 makes all stretches of the run as long, as many as the adapter has room for.

    >>> fb.ReLoRA().length(slots=3, total=100), fb.ReLoRA(every=10).length(slots=3, total=40)
    (25, 10)
    """

    null: ClassVar[dict[str, Any]] = {"every": 2**31}
    needs: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    writes: ClassVar[frozenset[str]] = frozenset({"A0", "B0"})
    forms: ClassVar[frozenset[Form]] = frozenset({"product"})

    def __init__(self, every: int = 0, warmup: int = 10, prune: float = 0.99, seed: int = 0) -> None:
        if not (every >= 0 and warmup >= 0 and 0 <= prune <= 1):
            raise Invalid(f"ReLoRA needs every >= 0, warmup >= 0, and prune from 0 to 1; got {every}, {warmup} and {prune}")
        self.every, self.warmup, self.prune, self.seed = every, warmup, prune, seed
        self.finished: dict[str, dict[str, Tensor]] = {}  # A₀ and B₀
        self.loaded = False
        self.rates: list[Any] = []  # of the optimizer's groups, for the time of one step

    def length(self, slots: int, total: int) -> int:
        """K. Raises where the adapter has not room for all stretches of a run of `total` steps but the last."""
        every = self.every or max(1, math.ceil(total / (slots + 1)))
        starts = max(total - 1, 0) // every
        if starts > slots:
            raise Invalid(
                f"ReLoRA starts anew {starts} times in {total} steps, and the adapter has room for {slots}: set its slots to {starts}"
            )
        return every

    def _length(self, run: Run, tensors: dict[str, family.Tensors]) -> int:
        return self.length(min(p["A0"].shape[0] // p["A"].shape[0] for p in tensors.values()), run.total)

    @torch.no_grad()
    def before_forward(self, run: Run) -> None:
        tensors = family.tensors(run, self)
        self._length(run, tensors)
        for name, p in tensors.items():
            for k in self.writes:
                if self.loaded:
                    p[k].copy_(self.finished[name][k])
        self.finished = {name: {k: p[k].detach() for k in self.writes} for name, p in tensors.items()}
        self.loaded = False

    def after_backward(self, run: Run) -> None:
        every = self._length(run, family.tensors(run, self))
        since = run.step % every
        if run.step >= every and since < self.warmup and run.optimizer is not None:
            self.rates = [group["lr"] for group in run.optimizer.param_groups]
            for group in run.optimizer.param_groups:
                group["lr"] = group["lr"] * (since + 1) / (self.warmup + 1)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for group, lr in zip([] if run.optimizer is None else run.optimizer.param_groups, self.rates, strict=False):
            group["lr"] = lr
        self.rates = []
        tensors = family.tensors(run, self)
        every = self._length(run, tensors)
        for name, p in tensors.items():
            self._check(run, p)
            if run.step % every == 0 and run.step < run.total:
                i, r = run.step // every - 1, p["A"].shape[0]
                p["A0"][i * r : (i + 1) * r] = p["A"]
                p["B0"][:, i * r : (i + 1) * r] = p["B"]
                gen = family.generator(self.seed, f"{name}/{run.step}")
                p["A"].copy_((torch.rand(p["A"].shape, generator=gen) * 2 - 1) / math.sqrt(p["A"].shape[1]))
                p["B"].zero_()
                for moment in [m for k in self.needs for m in self._moments(run, p[k])]:
                    pruned(moment, self.prune)

    def _moments(self, run: Run, p: Tensor) -> list[Tensor]:
        state = {} if run.optimizer is None else run.optimizer.state.get(p, {})
        return [v for v in state.values() if isinstance(v, Tensor) and v.shape == p.shape]

    def _check(self, run: Run, p: family.Tensors) -> None:
        if any(not m.is_floating_point() for k in self.needs for m in self._moments(run, p[k])):
            raise Invalid("ReLoRA prunes momenta, and those of this optimizer are no floats: take training.optim adamw")

    def state_dict(self) -> dict[str, Any]:
        return {"finished": self.finished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.finished = {name: {k: v.clone() for k, v in p.items()} for name, p in state["finished"].items()}
        self.loaded = True


def pruned(moment: Tensor, share: float) -> None:
    """Zero, in place, all but the largest 1 − share of the numbers.

    >>> m = torch.tensor([3.0, -5.0, 1.0, 0.5])
    >>> pruned(m, 0.75)
    >>> m
    tensor([ 0., -5.,  0.,  0.])
    """
    keep = round((1 - share) * moment.numel())
    gone = torch.ones(moment.numel(), dtype=torch.bool, device=moment.device)
    gone[moment.flatten().abs().topk(keep).indices] = False
    moment.masked_fill_(gone.view(moment.shape), 0.0)
