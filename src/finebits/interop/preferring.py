"""Answers that are compared, for the trainer: their rows, their log-probabilities without all outputs at a time, and what the reference says.

There is no second model. What the reference says of an answer is computed once, before the first step, from the model as it starts or from its
base with all adapters switched off, and kept: eight bytes an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from finebits.build import all_hosts
from finebits.errors import Invalid
from finebits.evaluate.heldout import evaluating
from finebits.losses import IGNORED
from finebits.objectives.base import Objective, Said
from finebits.tasks._categories import through
from finebits.tasks.base import Batch, Task, labelled, picked

OTHER = "other_"  # before the names of what belongs to the answer to another prompt
LIKED, REFERENCE = "liked", "reference"


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, and without what a start has laid over the base; both come back."""
    held = [(host, list(host.active)) for _, host in all_hosts(model)]
    try:
        for host, _ in held:
            host.active = []
        yield
    finally:
        for host, active in held:
            host.active = active


def log_probs(task: Task, model: Any, batch: Batch, chunk: int) -> Tensor:
    """log π(y | x) of every row (r,), differentiable; never more than `chunk` places have outputs."""

    def summed(inner: Any, batch: Batch) -> Tensor:
        states, labels, row = picked(task, task.states(inner, batch), batch)
        nll = task.head(inner).each(states, labels, chunk)
        return nll.new_zeros(len(batch["labels"])).index_add(0, row.to(nll.device), -nll)

    return through(model, batch, summed)


def alike(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Beside every row the answer of the next one to its own prompt, no longer than the longest row. Raises Invalid where there is one row."""
    if len(rows) < 2:
        raise Invalid("answers are compared with answers to other prompts, and there is one row: give more")
    most = max(len(r["input_ids"]) for r in rows)
    cut = [next((i for i, y in enumerate(r["labels"]) if y != IGNORED), len(r["labels"])) for r in rows]
    made = []
    for i, row in enumerate(rows):
        j = (i + 1) % len(rows)
        ids = [*row["input_ids"][: cut[i]], *rows[j]["input_ids"][cut[j] :]][:most]
        labels = [*[IGNORED] * cut[i], *rows[j]["labels"][cut[j] :]][:most]
        made.append({f"{OTHER}input_ids": ids, f"{OTHER}labels": labels})
    return made


class Preferring:
    """What a trainer asks of an objective: batches, losses, and what is measured of them."""

    def __init__(self, objective: Objective, task: Task, processor: Any, multiple: int, chunk: int) -> None:
        self.objective, self.task, self.processor, self.multiple, self.chunk = objective, task, processor, multiple, chunk
        self.z = 0.0

    def rows(self, examples: Iterable[Any]) -> list[dict[str, Any]]:
        """Rows of tokens, whether each was wanted, and what more the objective looks at. Raises Invalid where there is no row, or half a
        pair."""
        kept = [e if isinstance(e, Mapping) else vars(e) for e in examples]
        rows = [{k: list(e[k]) for k in ("input_ids", "labels")} | {LIKED: bool(e[LIKED])} for e in kept]
        if not rows or len(rows) % self.objective.together:
            raise Invalid(f"{len(rows)} answers are no whole number of pairs: give two answers to every prompt")
        if not self.objective.shifted:
            return rows
        return [row | more for row, more in zip(rows, alike(rows), strict=True)]

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tensors of some rows, those of answers to other prompts among them."""
        made = self.task.batch(rows, self.processor, self.multiple)
        made |= {LIKED: torch.tensor([r[LIKED] for r in rows])}
        for key in (REFERENCE, f"{OTHER}{REFERENCE}"):
            if key in rows[0]:
                made[key] = torch.tensor([r[key] for r in rows], dtype=torch.float32)
        if self.objective.shifted:
            others = [{k: r[f"{OTHER}{k}"] for k in ("input_ids", "labels")} for r in rows]
            made |= {f"{OTHER}{k}": v for k, v in self.task.batch(others, self.processor, self.multiple).items()}
        return made

    def refer(self, model: Any, rows: Sequence[dict[str, Any]], size: int, of: Iterable[int] | None = None) -> None:
        """Write into the rows (into `of` alone, where it says so) what the reference says of their answers: nothing where there is none."""
        if self.objective.reference is None:
            return
        device = next(model.parameters()).device
        wanted = sorted(set(range(len(rows)) if of is None else of), key=lambda i: (-len(rows[i]["input_ids"]), i))
        heads = ("", OTHER) if self.objective.shifted else ("",)
        for row in rows:
            row.update({f"{head}{REFERENCE}": 0.0 for head in heads})
        with evaluating(model), bare(model) if self.objective.reference == "base" else contextlib.nullcontext():
            for head in heads:
                for i in range(0, len(wanted), size):
                    some = wanted[i : i + size]
                    part = [{k: rows[n][f"{head}{k}"] for k in ("input_ids", "labels")} for n in some]
                    batch = self.task.batch(part, self.processor, self.multiple)
                    said = log_probs(self.task, model, {k: v.to(device) for k, v in batch.items()}, self.chunk)
                    for n, value in zip(some, said.tolist(), strict=True):
                        rows[n][f"{head}{REFERENCE}"] = value

    def count(self, batches: Iterable[Batch]) -> int:
        """What the losses of some batches are divided by: pairs, or answers."""
        return sum(len(b["labels"]) for b in batches) // self.objective.together

    def said(self, model: Any, batch: Batch) -> Said:
        """What model and reference say of a batch's answers."""
        inputs = {k: v for k, v in batch.items() if not k.startswith(OTHER) and k not in (LIKED, REFERENCE)}
        own = log_probs(self.task, model, inputs, self.chunk)
        tokens = (self.task.targets(batch["labels"]) != IGNORED).sum(-1).to(own.device)
        reference = batch.get(REFERENCE, torch.zeros(len(own))).to(own.device)
        return Said(own, reference, tokens, batch[LIKED].to(own.device), self.z)

    def measure(self, model: Any, batches: Sequence[Batch], device: Any, several: bool, idle: Sequence[Batch] = ()) -> None:
        """z of some batches, on all processes where there are `several`; their dropout is off and no random number is drawn. The `idle` ones
        go through as well and do not count: processes among which a model is cut make as many passes."""
        if not self.objective.shifted:
            return
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        with evaluating(model):
            for i, b in enumerate([*batches, *idle]):
                inputs = {k.removeprefix(OTHER): v.to(device) for k, v in b.items() if k.startswith(OTHER) and not k.endswith(REFERENCE)}
                gap = log_probs(self.task, model, inputs, self.chunk) - b[f"{OTHER}{REFERENCE}"].to(device)
                sums += torch.stack([gap.double().sum(), torch.ones_like(sums[0]) * len(gap)]) * (i < len(batches))
        if several:
            distributed.all_reduce(sums)
        self.z = max(float(sums[0] / sums[1].clamp(min=1)), 0.0)

    def found(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the losses, differentiable; sums of (loss, right, margin, tokens) as they are measured)."""
        said = self.said(model, batch)
        losses, margins = self.objective.losses(said), self.objective.margins(said).detach()
        seen = [losses.detach().sum(), (margins > 0).sum(), margins.sum(), torch.tensor(labelled(batch, self.task), device=losses.device)]
        return losses.sum(), torch.stack([s.double() for s in seen])


def held_batches(preferring: Preferring, rows: Sequence[dict[str, Any]], size: int) -> list[dict[str, Tensor]]:
    """Held-out rows with what the reference says of them; those of like length share a batch, and what is compared stays together."""
    g = preferring.objective.together
    groups = [rows[i : i + g] for i in range(0, len(rows), g)]
    groups.sort(key=lambda group: -max(len(r["input_ids"]) for r in group))
    per = max(size // g, 1)
    return [preferring.batch([r for group in groups[i : i + per] for r in group]) for i in range(0, len(groups), per)]


def check_sizes(said: Objective | None, per_batch: int, eval_size: int = 0) -> None:
    """Raises Invalid where a batch would cut what is compared."""
    if said is None:
        return
    for name, size in (("per_device_train_batch_size", per_batch), ("per_device_eval_batch_size", eval_size)):
        if size % said.together:
            raise Invalid(f"{name} is {size}, and every pair of answers takes two rows of a batch: give an even number")
