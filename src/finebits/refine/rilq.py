"""RILQ: Rank-Insensitive LoRA-based Quantization Error Compensation for Boosting 2-bit Large Language Model Accuracy.
Lee et al., AAAI 2025.  arXiv:2412.01129v3.

All adapters together against what the unquantized model makes of the same text (section 4, Model-Loss):

    argmin_{A, B}  E_t  D(h_t, ĥ_t),    h_t, ĥ_t the final states of the unquantized and the quantized model

loss="states" takes D = ‖ĥ_t − h_t‖² / ‖h_t‖²; loss="logits" takes D = KL(softmax(H h_t) ‖ softmax(H ĥ_t)) with the head H, on `positions`
evenly spaced positions of a batch, which keeps a large vocabulary small.
Deviations: the paper adds the cross-entropy of the text itself (GT-Loss), which pulls towards the calibration text rather than towards the
model, and is left out; "logits" is not in the paper and is the default here, since it is what is judged; the state loss is relative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from finebits.refine import _family as family
from finebits.refine.base import Task


@dataclass(frozen=True)
class RILQ:
    """`epochs` passes over the calibration batches; `positions` of a batch go through the head."""

    epochs: int = 2
    lr: float = 5e-4
    loss: Literal["logits", "states"] = "logits"
    positions: int = 256
    scope: ClassVar[Literal["block", "model"]] = "model"

    def __post_init__(self) -> None:
        family.check(self, epochs=self.epochs, lr=self.lr, positions=self.positions)
        if self.loss not in ("logits", "states"):
            raise ValueError(f"loss is {self.loss!r}; it can be 'logits' or 'states'")

    def __call__(self, task: Task) -> list[float]:
        if self.loss == "logits" and task.head is None:
            raise ValueError("RILQ(loss='logits') refines a whole model, and no head came: use loss='states'")
        return family.descend(task, lambda i: self._loss(task, i), self.epochs, self.lr)

    def _loss(self, task: Task, i: int) -> Tensor:
        ours, theirs = family.kept(task, i, task.ours(i)), family.kept(task, i, task.theirs(i))
        if self.loss == "states" or task.head is None:
            return family.relative(ours, theirs)
        step = max(1, -(-len(ours) // self.positions))
        at = slice(i % step, None, step)
        with torch.no_grad():
            log_p = task.head(theirs[at]).float().log_softmax(-1)
        log_q = task.head(ours[at]).float().log_softmax(-1)
        return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(log_q)
