"""INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation (LREC).
Chai et al., 2023.  arXiv:2306.08162v1.

The adapters over integer weights are distilled from the unquantized model on general text before (or instead of) any task:

    min_{A, B}  Σ_t CE(softmax(H h_t), softmax(H ĥ_t)) = Σ_t KL(softmax(H h_t) ‖ softmax(H ĥ_t)) + const

over all positions t, with h, ĥ the final states of the unquantized and the quantized model and H the head. What the teacher gave is held as
its final states: they are exact, and as small as the hidden size. The integers are left alone.
Deviations: soft labels alone, since a matching holds no text; logits are made for `chunk` positions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from finebits.refine import _family as family
from finebits.refine.base import Matching, Refine


@dataclass(frozen=True)
class LREC(Refine):
    """`epochs` passes over the calibration batches; `chunk` bounds the logits that exist at once and changes no result.

    >>> from finebits.refine.base import Matching, Refine
    >>> a, goal = torch.nn.Parameter(torch.zeros(1)), torch.full((1, 1, 1), 3.0).log()
    >>> two = lambda h: torch.cat([h, torch.zeros_like(h)], -1)  # logits of two words
    >>> matching = Matching(ours=lambda i: a.expand(1, 1, 1), theirs=lambda i: goal, tensors=[a], batches=1, head=two)
    >>> losses = fb.LREC(epochs=100, lr=0.1)(matching)
    >>> round(losses[0], 4), losses[-1] < 0.01  # KL of (1/2, 1/2) from (3/4, 1/4): 3/4 ln 3/2 − 1/4 ln 2
    (0.1308, True)
    """

    epochs: int = 2
    lr: float = 5e-4
    chunk: int = 256
    scope: ClassVar[Literal["block", "model"]] = "model"

    def __post_init__(self) -> None:
        family.check(self, epochs=self.epochs, lr=self.lr, chunk=self.chunk)

    def __call__(self, matching: Matching) -> list[float]:
        return family.descend(matching, family.compared(matching, self.scope, "LREC", self.chunk), self.epochs, self.lr)
