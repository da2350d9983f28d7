"""What refinements share: the loop over batches, and the loss of states."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.refine.base import Task


def check(who: object, **numbers: float) -> None:
    """Raise unless every number is above zero."""
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{type(who).__name__} needs {name} above 0, not {value}")


def descend(task: Task, loss: Callable[[int], Tensor], epochs: int, lr: float) -> list[float]:
    """Adam over the batches in order, under a learning rate that falls from `lr` to 0 as a cosine. Tensors are left without gradients.

    They are put back if a loss was not finite, or if the first batch of the last epoch lost more than it did before any step.
    """
    before = [p.detach().clone() for p in task.tensors]
    held = [p.requires_grad for p in task.tensors]
    for p in task.tensors:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(task.tensors, lr=lr, betas=(0.9, 0.99))
    total, losses = epochs * task.batches, []
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / total)) / 2
        value = loss(step % task.batches)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))
    for p, trained in zip(task.tensors, held, strict=True):
        p.requires_grad_(trained)
    if not all(map(math.isfinite, losses)) or losses[-task.batches] > losses[0]:
        with torch.no_grad():
            for p, was in zip(task.tensors, before, strict=True):
                p.copy_(was)
    return losses


def kept(task: Task, batch: int, states: Float[Tensor, "b t h"]) -> Float[Tensor, "p h"]:
    """The states that count, one a row."""
    mask = task.keep(batch)
    return states.flatten(0, -2) if mask is None else states[mask.to(states.device)]


def relative(ours: Float[Tensor, "p h"], theirs: Float[Tensor, "p h"]) -> Tensor:
    """Mean over positions of ‖ours − theirs‖² / ‖theirs‖²: a norm follows, so what counts is the direction."""
    theirs = theirs.float()
    return ((ours.float() - theirs).square().sum(-1) / theirs.square().sum(-1).clamp_min(1e-12)).mean()
