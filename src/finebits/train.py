"""The loop: for tests, calibration, simulation, and people who own their loop. `finebits train` runs on transformers' Trainer instead,
with the same four moments, the same order of rows and the same losses (interop.trainer).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from finebits.build import all_hosts
from finebits.errors import FinebitsError
from finebits.rules.base import Rule, Run, factor
from finebits.tasks import base as tasks
from finebits.tasks.base import Batch


class Diverged(FinebitsError, ArithmeticError):
    """A run whose loss, gradients or weights are no numbers any more.

    >>> isinstance(Diverged("…"), ArithmeticError), Diverged.code
    (True, 1)
    """


def sound(what: str, at: str, tensors: Iterable[Tensor | float], lower: str = "lower the learning rate") -> None:
    """Raises Diverged unless every number is finite; `lower` says what to do.

    >>> sound("the loss", "step 3", [0.5])
    >>> sound("the loss", "step 4", [float("nan")])
    Traceback (most recent call last):
        ...
    finebits.train.Diverged: step 4: the loss is not a finite number any more, and nothing of it is kept as a result: lower the learning rate
    """
    finite = [torch.as_tensor(t).detach().isfinite().all() for t in tensors]
    if finite and not bool(torch.stack([f.cpu() for f in finite]).all()):
        raise Diverged(f"{at}: {what} is not a finite number any more, and nothing of it is kept as a result: {lower}")


def train(
    model: nn.Module,
    steps: Iterable[Sequence[Batch]],
    optimizer: torch.optim.Optimizer,
    *,
    total: int,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    tokens: Callable[[Batch], int] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    rules: Sequence[Rule] = (),
    clip: float | None = None,
    on_step: Callable[[Run, float], None] = lambda run, loss: None,
) -> list[float]:
    """Train for as many steps as `steps` gives; each is a list of micro-batches whose gradients are added up.

    `loss` returns the sum over a batch's labels and `tokens` counts them, both as the model's task does where none is given; a step's loss is
    the mean over all labels of all its micro-batches. Returns the loss of each step. `total` is the number of steps that schedules of rules
    count on. Raises Diverged at the first loss that is no number, before the optimizer's step.

    Rules that ask for rates of their own cut the optimizer's groups; where there is a `scheduler`, call `fb.factor` before it is made.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> model.weight.data = torch.tensor([[2.0]])
    >>> square = lambda model, batch: model(batch["x"]).square().sum()
    >>> sgd, batch = torch.optim.SGD(model.parameters(), lr=0.25), {"x": torch.ones(1, 1)}
    >>> fb.train(model, [[batch], [batch]], sgd, total=2, loss=square, tokens=lambda batch: 1)  # w = 2, then 2 − ¼ · 2 · 2 = 1
    [4.0, 1.0]
    """
    run = Run(model, dict(all_hosts(model)), optimizer, 0, total)
    factor(optimizer, rules, run)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    task = tasks.of(model)
    loss, tokens = loss or task.loss, tokens or (lambda batch: tasks.labelled(batch, task))
    losses = []
    model.train()
    for batches in steps:
        for rule in rules:
            rule.before_forward(run)
        count = max(sum(tokens(b) for b in batches), 1)
        step_loss = 0.0
        for batch in batches:
            own = loss(model, batch) / count
            penalised = own + sum(rule.penalty(run) for rule in rules) / len(batches) if rules else own
            penalised.backward()
            step_loss += float(own.detach())
        sound("the loss", f"step {run.step + 1}", [step_loss])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in trained if p.grad is not None], clip)
        for rule in rules:
            rule.after_backward(run)
        optimizer.step()
        run.step += 1
        for rule in rules:
            rule.after_step(run)
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step_loss)
        on_step(run, step_loss)
    return losses


def order(lengths: Sequence[int], per_batch: int, seed: int, window: int = 16, together: int = 1) -> list[list[int]]:
    """Batches of row numbers for one epoch: shuffled by `seed`, rows of like length together (sorted within windows of `window` batches),
    batches shuffled again, and the batch that takes most memory first: what will not fit fails at once. A short last batch stays last. So many
    rows in turn stay `together`, as pairs do.

    >>> order([5, 1, 9, 2], 2, seed=0)[0]  # rows of like length together, the batch of the longest first
    [2, 0]
    >>> order([5, 1, 9, 2], 2, seed=0, together=2)[0]
    [2, 3]
    """
    if together > 1:
        groups = [max(lengths[i : i + together]) for i in range(0, len(lengths), together)]
        batches = order(groups, max(per_batch // together, 1), seed, window)
        return [[g * together + k for g in batch for k in range(together)] for batch in batches]
    gen = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(lengths), generator=gen).tolist()
    size = per_batch * window
    rows = [r for i in range(0, len(rows), size) for r in sorted(rows[i : i + size], key=lambda r: (-lengths[r], r))]
    batches = [rows[i : i + per_batch] for i in range(0, len(rows), per_batch)]
    rest = [batches.pop()] if batches and len(batches[-1]) < per_batch else []
    if not batches:
        return rest
    shuffled = [batches[i] for i in torch.randperm(len(batches), generator=gen).tolist()]
    worst = max(range(len(shuffled)), key=lambda i: (max(lengths[r] for r in shuffled[i]), -i))
    shuffled.insert(0, shuffled.pop(worst))
    return shuffled + rest


def met(
    lengths: Sequence[int], per_batch: int, seed: int, passes: int, max_steps: int, num_epochs: float, together: int = 1
) -> list[list[int]]:
    """The batches that a run meets: those of `max_steps` steps of `passes` batches each, or of so many epochs where that is not above 0.

    >>> len(met([5, 1, 9, 2], 2, 0, passes=2, max_steps=3, num_epochs=1.0)), len(met([5, 1, 9, 2], 2, 0, 2, -1, 1.5))
    (6, 3)
    """
    count = number_of(len(lengths), per_batch, passes, max_steps, num_epochs)
    return list(itertools.islice(epochs(lengths, per_batch, seed, together), count))


def number_of(rows: int, per_batch: int, passes: int, max_steps: int, num_epochs: float) -> int:
    """Of the batches that a run of so many rows meets.

    >>> number_of(5, 2, passes=2, max_steps=3, num_epochs=1.0), number_of(5, 2, passes=2, max_steps=-1, num_epochs=1.0)
    (6, 3)
    """
    return max_steps * passes if max_steps > 0 else math.ceil(num_epochs * -(-rows // per_batch))


def epochs(lengths: Sequence[int], per_batch: int, seed: int, together: int = 1) -> Iterator[list[int]]:
    """Batches without end: epoch after epoch, each in its own order.

    >>> batches = epochs([5, 1, 9, 2], 2, 0)
    >>> sorted(next(batches) + next(batches)), sorted(next(batches) + next(batches))  # each epoch meets every row
    ([0, 1, 2, 3], [0, 1, 2, 3])
    """
    epoch = 0
    while True:
        yield from order(lengths, per_batch, seed + epoch, together=together)
        epoch += 1
