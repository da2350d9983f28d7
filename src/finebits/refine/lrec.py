"""INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation (LREC).
Chai et al., 2023.  arXiv:2306.08162v1.

The adapters over integer weights are distilled from the unquantized model on general text before (or instead of) any task:

    min_{A, B}  Σ_t CE(softmax(H h_t), softmax(H ĥ_t)) = Σ_t KL(softmax(H h_t) ‖ softmax(H ĥ_t)) + const

over all positions t, with h, ĥ the final states of the unquantized and the quantized model and H the head. What the teacher gave is held as
its final states: they are exact, and as small as the hidden size. The integers are left alone.
Deviations: soft labels alone, since a task holds no text; logits are made for `chunk` positions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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
        return family.distil(task, "LREC", self.epochs, self.lr, self.chunk)
