"""ApiQ: Finetuning of 2-Bit Quantized Large Language Model.  Liao et al., EMNLP 2024.  arXiv:2402.05147v3.

Block by block (ApiQ-bw, section 4.2), with inputs X^q that come from the quantized blocks before it and X from the unquantized ones:

    argmin_{A, B}  ‖F(W, X) − F(Q + s·B A, X^q)‖²        over the adapters of all linears of the block F together

so that every block also makes good what the blocks before it lost, with one block in memory.
Deviations: the error of a token is divided by ‖F(W, X)‖², since a norm follows and a few tokens are a thousand times longer than the rest;
Q comes from the plan's quantizer and is not learned (the paper learns clipping thresholds along with A and B), and the adapters start where
the plan's initialiser put them; Adam without weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from finebits.refine import _family as family
from finebits.refine.base import Task


@dataclass(frozen=True)
class ApiQ:
    """`epochs` passes over the calibration batches for every block, at learning rates that fall from `lr` to 0."""

    epochs: int = 4
    lr: float = 1e-3
    scope: ClassVar[Literal["block", "model"]] = "block"

    def __post_init__(self) -> None:
        family.check(self, epochs=self.epochs, lr=self.lr)

    def __call__(self, task: Task) -> list[float]:
        ours = lambda i: family.kept(task, i, task.ours(i))  # noqa: E731
        return family.descend(task, lambda i: family.relative(ours(i), family.kept(task, i, task.theirs(i))), self.epochs, self.lr)
