"""INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation (LREC).
Chai et al., 2023.  arXiv:2306.08162v1.

The adapters over integer weights are distilled from the unquantized model on general text before (or instead of) any task:

    min_{A, B}  Σ_t CE(softmax(H h_t), softmax(H ĥ_t)) = Σ_t KL(softmax(H h_t) ‖ softmax(H ĥ_t)) + const

over all positions t, with h, ĥ the final states of the unquantized and the quantized model and H the head. What the teacher gave is held as
its final states: they are exact, and as small as the hidden size. The integers are left alone. With the biases (and gains of norms) in the
place of the adapters it is the bias tuning of Hubara et al., 2020, section 3.4 (arXiv:2006.10518v2).
Deviations: soft labels alone, since a task holds no text; logits are made for `chunk` positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.refine import _family as family
from finebits.refine.base import Task


@dataclass(frozen=True)
class LREC:
    """`epochs` passes over the calibration batches; `chunk` bounds the logits that exist at once and changes no result."""

    epochs: int = 2
    lr: float = 5e-4
    chunk: int = 256
    scope: ClassVar[Literal["block", "model"]] = "model"

    def __post_init__(self) -> None:
        family.check(self, epochs=self.epochs, lr=self.lr, chunk=self.chunk)

    def __call__(self, task: Task) -> list[float]:
        head = task.head
        if head is None:
            raise ValueError("LREC compares what the head makes of the final states, and no head came: it refines a whole model")
        kept = lambda i, states: family.kept(task, i, states)  # noqa: E731
        loss = lambda i: divergence(kept(i, task.ours(i)), kept(i, task.theirs(i)), head, self.chunk)  # noqa: E731
        return family.descend(task, loss, self.epochs, self.lr)


def divergence(ours: Float[Tensor, "p h"], theirs: Float[Tensor, "p h"], head: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """Mean over positions of KL(softmax(head(theirs)) ‖ softmax(head(ours))); the gradient of `ours` is found chunk by chunk on the way."""
    total, grads = ours.new_zeros((), dtype=torch.float32), []
    for h, t in zip(ours.detach().split(chunk), theirs.detach().split(chunk), strict=True):
        with torch.no_grad():
            log_p = head(t).float().log_softmax(-1)
        with torch.enable_grad():
            h = h.requires_grad_()
            kl = torch.nn.functional.kl_div(head(h).float().log_softmax(-1), log_p, reduction="sum", log_target=True) / len(ours)
        grads.append(torch.autograd.grad(kl, h)[0])
        total += kl.detach()
    step = (ours * torch.cat(grads)).sum().float()
    return total + (step - step.detach())
