"""What refinements share: the loop over batches, the loss of states, and that of what the head makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finebits.errors import Invalid
from finebits.refine.base import Matching

WORSE = 2.0  # one batch says that steps were far too long, and not whether short ones helped the others


def check(who: object, **numbers: float) -> None:
    """Raise unless every number is above zero."""
    for name, value in numbers.items():
        if not value > 0:
            raise Invalid(f"{type(who).__name__} needs {name} above 0, not {value}")


def descend(
    matching: Matching,
    loss: Callable[[int], Tensor],
    epochs: int,
    lr: float,
    scales: float = 0.0,
    before_step: Callable[[int], None] = lambda batch: None,
) -> list[float]:
    """Adam over the batches in order, under learning rates that fall to 0 as a cosine, from `lr`, and from `scales` for the matching's scales.
    Tensors are left without gradients. `before_step` is called with the batch of every step.

    Those of less than float32 follow copies in float32, since a step is smaller than what they can hold. All, and the codes of words, are put
    back if a loss was not finite, which ends it, or if the first batch loses WORSE times as much after the last step as before any.
    """
    tensors = [*matching.tensors, *matching.scales]
    moved = [*tensors, *(one.codes for one in matching.words)]
    before = [p.detach().clone() for p in moved]
    required_grad = [p.requires_grad for p in tensors]
    for p in tensors:
        p.requires_grad_(True)
    exact = [p if p.dtype == torch.float32 else p.detach().float() for p in tensors]
    few = len(matching.tensors)
    groups = [{"params": exact[:few], "top": lr}, {"params": exact[few:], "top": scales}]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.99))
    total, losses = epochs * matching.batches, []
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * (1 + math.cos(math.pi * step / total)) / 2
        before_step(step % matching.batches)
        value = loss(step % matching.batches)
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            break
        value.backward()
        for p, e in zip(tensors, exact, strict=True):
            if p is not e and p.grad is not None:
                e.grad, p.grad = p.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for p, e in zip(tensors, exact, strict=True):
                if p is not e:
                    p.copy_(e)
        optimizer.zero_grad(set_to_none=True)
    for p, trained in zip(tensors, required_grad, strict=True):
        p.requires_grad_(trained)
    with torch.no_grad():
        if not math.isfinite(losses[-1]) or not float(loss(0)) <= WORSE * losses[0]:
            for p, was in zip(moved, before, strict=True):
                p.copy_(was)
    return losses


def kept(matching: Matching, batch: int, states: Float[Tensor, "b t h"]) -> Float[Tensor, "p h"]:
    """The states that count, one a row."""
    mask = matching.keep(batch)
    return states.flatten(0, -2) if mask is None else states[mask.to(states.device)]


def relative(ours: Float[Tensor, "p h"], theirs: Float[Tensor, "p h"]) -> Tensor:
    """Mean over positions of ‖ours − theirs‖² / ‖theirs‖²: a norm follows, so what counts is the direction."""
    theirs = theirs.float()
    return ((ours.float() - theirs).square().sum(-1) / theirs.square().sum(-1).clamp_min(1e-12)).mean()


def compared(matching: Matching, scope: str, who: str, chunk: int) -> Callable[[int], Tensor]:
    """What a batch loses: the relative error of the states of a block, the divergence of what the head makes of the final ones of a model.
    Raises ValueError where a model has no head."""
    head = matching.head
    states = lambda i: (kept(matching, i, matching.ours(i)), kept(matching, i, matching.theirs(i)))  # noqa: E731
    if scope == "block":
        return lambda i: relative(*states(i))
    if head is None:
        raise Invalid(f"{who} compares what the head makes of the final states, and no head came: it refines a whole model")
    return lambda i: divergence(*states(i), head, chunk)


def divergence(ours: Float[Tensor, "p h"], theirs: Float[Tensor, "p h"], head: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """Mean over positions of KL(softmax(head(theirs)) ‖ softmax(head(ours)))."""

    def part(h: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = head(t).float().log_softmax(-1)
        return torch.nn.functional.kl_div(head(h).float().log_softmax(-1), log_p, reduction="sum", log_target=True)

    return _chunked(part, ours, theirs.detach(), chunk)


def surprise(states: Float[Tensor, "p h"], words: Int[Tensor, " p"], head: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """Mean over positions of −log softmax(head(states)) at the word that follows."""
    part = lambda h, y: torch.nn.functional.cross_entropy(head(h).float(), y, reduction="sum")  # noqa: E731
    return _chunked(part, states, words, chunk)


def _chunked(part: Callable[[Tensor, Tensor], Tensor], ours: Float[Tensor, "p h"], goal: Tensor, chunk: int) -> Tensor:
    """The mean of what `part` sums over positions; the gradient of `ours` is found chunk by chunk on the way."""
    total, grads = ours.new_zeros((), dtype=torch.float32), []
    for h, g in zip(ours.detach().split(chunk), goal.split(chunk), strict=True):
        with torch.enable_grad():
            h = h.requires_grad_()
            value = part(h, g) / len(ours)
        grads.append(torch.autograd.grad(value, h)[0])
        total += value.detach()
    step = (ours * torch.cat(grads)).sum().float()
    return total + (step - step.detach())
