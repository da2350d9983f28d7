"""Loss, divergence from a teacher and agreement on held-out rows, without the outputs of all places at a time.

The teacher's states at the labelled places are kept in bf16; its outputs are made again, through its own head, a few places at a time, and so
are the model's. Outputs are float32 products whatever the model computes in: what is compared is the models, not the rounding of their heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from finebits.build import Adapted
from finebits.carrier import Following
from finebits.errors import Invalid
from finebits.evaluate.exact import exact, followed, product
from finebits.evaluate.resampled import Resampled
from finebits.lookup import is_linear
from finebits.losses import IGNORED
from finebits.tasks import base as tasks
from finebits.tasks._head import Head as Way
from finebits.tasks.base import Batch, Task, picked
from finebits.tensorfile import Spool, Stored

SCHEMA = "finebits.evaluation/1"

Hidden = Callable[[Batch], Tensor]  # a batch -> final states
Head = Callable[[Tensor], Tensor]  # states (p, h) -> outputs (p, k), float32


@dataclass(frozen=True)
class Teacher:
    """Final states (p, h) of every batch's labelled places, held or in a file, and the head that makes outputs of them.

    >>> taught = Teacher(lambda h: h, [torch.ones(3, 2)])
    >>> len(taught), taught.batch(0).shape
    (1, torch.Size([3, 2]))
    """

    head: Head
    states: list[Tensor] | Path
    task: Task = field(default_factory=lambda: tasks.of(None))

    def batch(self, i: int) -> Tensor:
        """The states of batch i.

        >>> Teacher(lambda h: h, [torch.ones(3, 2), torch.zeros(1, 2)]).batch(1)
        tensor([[0., 0.]])
        """
        return Stored(self.states)[str(i)] if isinstance(self.states, Path) else self.states[i]

    def __len__(self) -> int:
        return len(Stored(self.states) if isinstance(self.states, Path) else self.states)


@dataclass(frozen=True)
class Scores:
    """Sums of every row, in the order of the batches (float64): −log p over its labels, their number, KL(teacher‖model), places whose
    likeliest output is the teacher's, and those whose likeliest is the label. `kl` and `agree` are None where there was no teacher.

    >>> rows = Scores(nll=np.array([2.0, 4.0]), tokens=np.array([1.0, 3.0]))
    >>> rows.loss  # 6 nats over four labels: rows count as they are long
    1.5
    """

    nll: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray | None = None
    agree: np.ndarray | None = None
    right: np.ndarray | None = None

    @property
    def loss(self) -> float:
        """Mean −log p of a label."""
        return float(self.nll.sum() / self.tokens.sum())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is put back.

    >>> model = torch.nn.Dropout()
    >>> with evaluating(model):
    ...     print(model.training, torch.is_grad_enabled())
    False False
    >>> model.training
    True
    """
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def backbone(model: nn.Module) -> Hidden:
    """The final states of a transformers model, on the device of its parameters."""
    device, task = next(p.device for p in model.parameters()), tasks.of(model)
    return lambda batch: task.states(model, {k: v.to(device) for k, v in batch.items()})


def head_of(head: Way) -> Head:
    """The outputs of final states, as float32 products.

    A dense head is multiplied in slices, so that its float32 copy never exists; the weight is held as it is now, also if the module is
    quantized later.
    """
    module: Any = head.module
    plain = is_linear(module)
    weight, bias = (module.weight, module.bias) if plain else (torch.empty(0), None)

    def outputs(h: Float[Tensor, "p h"]) -> Float[Tensor, "p v"]:
        if plain:
            return head.shape(product(h, weight, bias))
        if isinstance(module, Following):
            return head.shape(followed(module)(h))
        return head.shape(exact(module)(h)) if isinstance(module, Adapted) else head(h)

    return outputs


def teacher(
    model: nn.Module,
    batches: Sequence[Batch],
    hidden: Hidden | None = None,
    head: Head | None = None,
    file: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Teacher:
    """One pass over the batches (dicts of input_ids, attention_mask, labels with −100). With `file`, states go to a safetensors file batch
    by batch instead of memory: 2 · h bytes a labelled position either way.

    >>> model, batch = torch.nn.Linear(2, 2), {"labels": torch.tensor([[0, 1, 1]])}
    >>> taught = teacher(model, [batch], hidden=lambda batch: torch.zeros(1, 3, 2), head=lambda h: torch.zeros(len(h), 4))
    >>> taught.batch(0).shape, taught.batch(0).dtype  # a state for each of two labels
    (torch.Size([2, 2]), torch.bfloat16)
    """
    hidden, head = _parts(model, hidden, head, batches)
    task = tasks.of(model)
    with evaluating(model):
        if file is None:
            return Teacher(head, [picked(task, hidden(b), b)[0].to(dtype) for b in batches], task)
        file.parent.mkdir(parents=True, exist_ok=True)
        with Spool(file) as spool:
            for i, b in enumerate(batches):
                spool.add(str(i), picked(task, hidden(b), b)[0].to(dtype))
            spool.close({})
    return Teacher(head, file, task)


def score(
    model: nn.Module,
    batches: Sequence[Batch],
    teacher: Teacher | None = None,
    chunk: int = 256,
    hidden: Hidden | None = None,
    head: Head | None = None,
) -> Scores:
    """Per-row sums of a model on the batches that the teacher saw. At most 3 · chunk · outputs floats exist at a time.

    Raises ValueError if nothing is labelled, or if the teacher's states are of other batches.

    >>> model, batch = torch.nn.Linear(2, 2), {"labels": torch.tensor([[0, 1, 1]])}
    >>> made = score(model, [batch], hidden=lambda batch: torch.zeros(1, 3, 2), head=lambda h: torch.zeros(len(h), 4))
    >>> made.tokens, made.loss  # two labels among four equal outputs: log 4
    (array([2.]), 1.3863)
    """
    hidden, head = _parts(model, hidden, head, batches)
    if teacher is not None and len(teacher) != len(batches):
        raise Invalid(f"the teacher saw {len(teacher)} batches and {len(batches)} are to be scored: give both the same batches")
    rows, task = [], tasks.of(model)
    with evaluating(model):
        for i, b in enumerate(batches):
            states, y, row = picked(task, hidden(b), b)
            if teacher is not None and len(teacher.batch(i)) != len(y):
                raise Invalid(f"batch {i} has {len(y)} labels and the teacher saw {len(teacher.batch(i))}: other batches")
            rows.append(_sums(task, states, y, row, b["labels"].shape[0], head, teacher, i, chunk))
    sums = np.concatenate(rows, 1)
    if not sums[0].sum():
        raise Invalid("no held-out row has a label: nothing can be scored")
    return _scores(sums)


def own(teacher: Teacher, batches: Sequence[Batch], chunk: int = 256) -> Scores:
    """The teacher's own scores, from the states that it left: KL 0, agreement everywhere.

    >>> model, batch = torch.nn.Linear(2, 2), {"labels": torch.tensor([[0, 1, 1]])}
    >>> taught = teacher(model, [batch], hidden=lambda batch: torch.zeros(1, 3, 2), head=lambda h: torch.zeros(len(h), 4))
    >>> made = own(taught, [batch])
    >>> made.kl, made.agree
    (array([0.]), array([2.]))
    """
    rows = []
    with torch.no_grad():
        for i, b in enumerate(batches):
            y = teacher.task.targets(b["labels"])
            keep = y != IGNORED
            row = keep.nonzero()[:, 0]
            rows.append(_sums(teacher.task, teacher.batch(i), y[keep], row, len(b["labels"]), teacher.head, teacher, i, chunk))
    return _scores(np.concatenate(rows, 1))


def _sums(
    task: Task, states: Tensor, y: Tensor, row: Tensor, rows: int, head: Head, teacher: Teacher | None, batch: int, chunk: int
) -> np.ndarray:
    """How many labels every row of a batch has, and the sums of what `task.score` gives for them."""
    out = torch.zeros(3 if teacher is None else 5, rows, dtype=torch.float64)
    seen = None if teacher is None else teacher.batch(batch)
    for i in range(0, len(y), chunk):
        at, part = row[i : i + chunk].cpu(), slice(i, i + chunk)
        theirs = None if seen is None or teacher is None else teacher.head(seen[part])
        scores = task.score(head(states[part]), y[part], theirs)
        del theirs  # before the next chunk's exist
        out.index_add_(1, at, torch.cat([torch.ones(1, len(at), dtype=torch.float64), scores]))
    return out.numpy()


def _scores(sums: np.ndarray) -> Scores:
    tokens, nll, right, *taught = sums
    return Scores(nll, tokens, *taught, right=right)


def _parts(model: nn.Module, hidden: Hidden | None, head: Head | None, batches: Sequence[Batch]) -> tuple[Hidden, Head]:
    if not batches:
        raise Invalid("there are no held-out batches to score")
    return hidden or backbone(model), head or head_of(tasks.of(model).head(model))


def table(
    scores: Mapping[str, Scores],
    names: Mapping[str, str],
    stages: Mapping[str, str],
    against: str | Mapping[str, str] = "full",
    bits: Mapping[str, float] | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """evaluation.json: token-weighted means, 95% intervals by resampling rows (2,000 times, seeded), and differences by the same resamples.
    Of fewer than LEAST rows there are no intervals. `bits` are those of a linear weight, where an entry has some; `task` says what is shown
    beside loss, KL and agreement.

    `against` names the entry that each is compared with, one for all or one for each key. `gap_closed` of a tuned entry x is
    (loss(full) − loss(x)) / (loss(full) − loss(lora16)), None where either is missing or 16-bit LoRA did not improve on `full`.
    Raises ValueError if two entries were not scored on the same rows.

    >>> full, tuned = (Scores(np.array([n, 2 * n]), np.array([10.0, 20.0])) for n in (20.0, 15.0))
    >>> made = table({"full": full, "qera": tuned}, {"full": "unquantized", "qera": "ours"}, {"full": "before", "qera": "tuned"})
    >>> [(entry["name"], entry["loss"]) for entry in made["entries"]], made["entries"][1]["paired"]["loss"]  # two rows give no interval
    ([('unquantized', 2.0), ('ours', 1.5)], [-0.5, None, None])
    """
    if not scores:
        raise Invalid("there are no scores to make a table of")
    first = next(iter(scores.values()))
    for key, s in scores.items():
        if len(s.tokens) != len(first.tokens) or not np.array_equal(s.tokens, first.tokens):
            raise Invalid(f"{key} was not scored on the rows of {next(iter(scores))}: the entries of one table need the same batches")
    drawn = Resampled(first.tokens)
    mean, interval, minus = drawn.mean, drawn.interval, drawn.minus
    task = task or tasks.of(None)
    accurate = "accuracy" in task.measures

    def sums(s: Scores) -> dict[str, np.ndarray | None]:
        return {"loss": s.nll, "kl": s.kl, "top1": s.agree} | ({"accuracy": s.right} if accurate else {})

    entries = []
    for key, s in scores.items():
        other = against if isinstance(against, str) else against.get(key)
        if other is not None and other not in scores and not isinstance(against, str):
            raise Invalid(f"{key} is to be compared with {other}, which was not scored (there are {', '.join(scores)})")
        o = scores.get(other) if other is not None and other != key else None
        closed = None
        if stages[key] == "tuned" and "full" in scores and "lora16" in scores:
            gap = scores["full"].loss - scores["lora16"].loss
            closed = (scores["full"].loss - s.loss) / gap if gap > 0 else None
        entries.append(
            {
                "key": key,
                "name": names[key],
                "stage": stages[key],
                "bits": (bits or {}).get(key),
                "loss": s.loss,
                **({"perplexity": math.exp(s.loss) if s.loss < 700 else None} if "perplexity" in task.measures else {}),
                **({"accuracy": mean(s.right)} if accurate else {}),
                "kl": mean(s.kl),
                "top1": mean(s.agree),
                "intervals": {k: interval(v) for k, v in sums(s).items()},
                "paired": None if o is None else {"against": other} | {k: minus(v, sums(o)[k]) for k, v in sums(s).items() if k != "top1"},
                "gap_closed": closed,
            }
        )
    return {"schema": SCHEMA, "rows": drawn.rows, "tokens": int(first.tokens.sum()), "unit": task.unit, "entries": entries}
