"""What tasks share whose labels are categories: the loss is −log p(label), the divergence is Kullback and Leibler's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from finebits.errors import Invalid, WrongUse
from finebits.evaluate.heldout import backbone, evaluating
from finebits.tasks._head import Head, instead
from finebits.tasks.base import Batch, Prompt, Task, picked

SLICE = 8192  # outputs that are summed at a time


class Sharded(nn.Module):
    """What stands around a model that is cut among processes, as DistributedDataParallel around one that each holds whole
    (`finebits.interop.sharding`, which makes it)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.module(*given, **named)


def unwrapped(model: Any) -> Any:
    """The model in DistributedDataParallel, or that is cut; any other is itself."""
    return model.module if isinstance(model, DistributedDataParallel | Sharded) else model


def loss(task: Task, model: Any, batch: Batch, chunk: int = 256, smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Sum over labels of −log p(label), smoothed by ε: the model's states, then its head chunk by chunk."""

    def summed(inner: Any, batch: Batch) -> Tensor:
        states, labels, _ = picked(task, task.states(inner, batch), batch)
        return task.head(inner).loss(states, labels, chunk, smoothing)

    return through(model, batch, summed)


def through(model: Any, batch: Batch, made: Callable[[Any, Batch], Tensor]) -> Tensor:
    """What `made` makes of the model and the batch. Under a wrapper all of it is the wrapper's forward, which makes ready for the gradients of
    what it returns."""
    inner = unwrapped(model)
    if inner is model:
        return made(model, batch)
    own = inner.forward

    def forward(**inputs: Tensor) -> Tensor:
        with instead(inner, own):
            return made(inner, inputs)

    with instead(inner, forward):
        return model(**batch)


def drawn(task: Task, generator: torch.Generator) -> Callable[..., Tensor]:
    """The loss with every label drawn from the model's own distribution: its mean squared gradients are the Fisher information."""

    def summed(model: Any, batch: Batch, chunk: int = 256) -> Tensor:
        head = task.head(model)
        states, labels, _ = picked(task, task.states(model, batch), batch)
        with torch.no_grad():
            flat = states.detach().split(chunk)
            own = [torch.multinomial(head(s).softmax(-1).cpu(), 1, generator=generator)[:, 0] for s in flat if len(s)]
        return head.loss(states, torch.cat(own).to(labels.device) if own else labels, chunk)

    return summed


def score(outputs: Float[Tensor, "p k"], labels: Int[Tensor, " p"], teacher: Float[Tensor, "p k"] | None) -> Tensor:
    """A row for each of `SCORES`, for every place, in float64: −log p(label); whether the likeliest output is the label; KL(teacher ‖ outputs);
    whether the likeliest output is the teacher's. What is given is written over."""
    log_q = outputs.sub_(outputs.logsumexp(-1, keepdim=True))
    labels = labels.to(log_q.device)
    best = log_q.argmax(-1)
    rows = [-log_q.gather(1, labels[:, None])[:, 0], best == labels]
    if teacher is not None:
        teacher = teacher.to(log_q.device)
        agree = teacher.argmax(-1) == best
        log_p = teacher.sub_(teacher.logsumexp(-1, keepdim=True))
        terms = (log_p - log_q).mul_(log_p.exp_())
        kl = torch.stack([part.sum(-1, dtype=torch.float64) for part in terms.split(SLICE, -1)]).sum(0)  # a wider sum is of a copy
        rows += [kl, agree]
    return torch.stack([r.double().cpu() for r in rows])


def same(task: Task, x: Tensor) -> Tensor:
    """Where a row has one state and one label, these are all that there are."""
    return x


def every(task: Task, batch: Batch) -> None:
    """No place is padding."""


def rows_of(task: Task, batch: Batch, states: Tensor) -> tuple[Tensor, Tensor]:
    """What calibration rows say: their labels."""
    return states, batch["labels"].to(states.device)


def rows_in(task: Task, batches: Sequence[Batch], processor: Any) -> int:
    """What is learned is as much as there are rows."""
    return sum(len(b["labels"]) for b in batches)


def answers(task: Any, model: Any, prompts: Sequence[Prompt], processor: Any, stops: Sequence[int], room: int | None) -> list[str]:
    """The likeliest label of every prompt, and how likely it is."""
    texts = []
    with evaluating(model):
        for p in prompts:
            outputs = task.head(model)(backbone(model)(task.batch([{"input_ids": p.given}], processor)))[0]
            share, best = outputs.softmax(-1).max(-1)
            texts.append(f"{task.labels[int(best)]} ({float(share):.0%})")
    return texts


def names_of(config: Any) -> tuple[str, ...]:
    """The names of a model's classes. Raises Invalid where it has fewer than two, or tells several of one row."""
    kind, count = getattr(config, "problem_type", None), getattr(config, "num_labels", 0)
    if kind not in (None, "single_label_classification") or count < 2:
        what = f"a problem_type of {kind}" if count >= 2 else f"{count} label{'' if count == 1 else 's'}"
        raise WrongUse(f"config.json has {what}, and a classifier here gives one of several labels: set problem_type and id2label for that")
    return tuple(str(config.id2label.get(i, i)) for i in range(count))


def classifier(model: Any, outputs: int) -> Head:
    """The head of a classifier: the last linear layer behind its backbone that gives so many numbers. Raises Invalid where there is none."""
    inside = f"{model.base_model_prefix}."
    layers = [m for k, m in model.named_modules() if not k.startswith(inside) and getattr(m, "out_features", None) == outputs]
    if not layers:
        raise Invalid(f"{type(model).__name__} has no linear layer that gives its {outputs} outputs: finebits does not know its head")
    return Head(layers[-1])


def before(model: Any, head: Head, inputs: Mapping[str, Any]) -> Float[Tensor, "b h"]:
    """What the model's own forward hands to its head, once it has picked what counts."""
    with instead(head.module, lambda h: h):
        states = model(**inputs).logits
    wide: Any = head.module
    if states.ndim != 2 or states.shape[-1] != wide.in_features:
        raise Invalid(f"{type(model).__name__} does something between its head and its outputs that picks no row: it is not trained here")
    return states
