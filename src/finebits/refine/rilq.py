"""RILQ: Rank-Insensitive LoRA-based Quantization Error Compensation for Boosting 2-bit Large Language Model Accuracy.
Lee et al., AAAI 2025.  arXiv:2412.01129v3.

All adapters together, towards the unquantized model's final states and towards the text itself (section 4, Model-Loss and GT-Loss):

    argmin_{A, B}  λ_M · mean (h_t − ĥ_t)² + λ_GT · mean_t −log softmax(H ĥ_t)_{y_{t+1}}

with h_t, ĥ_t the final states of the unquantized and the quantized model, H the head and y the text; both weights are 1/2 in the authors' code.
`truth` is λ_GT, and λ_M is 1 − `truth`; at 0 no head is needed. LREC minimises the divergence of the logits instead.
Deviations: logits are made for `chunk` positions at a time; the last iterate is kept, where the code keeps the best on validation text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from finebits.errors import Invalid
from finebits.refine import _family as family
from finebits.refine.base import Matching, Refine


@dataclass(frozen=True)
class RILQ(Refine):
    """`epochs` passes over the calibration batches; `truth` weighs the text; `chunk` bounds the logits that exist at once.

    >>> from finebits.refine.base import Matching, Refine
    >>> a = torch.nn.Parameter(torch.zeros(1))
    >>> matching = Matching(ours=lambda i: a.expand(1, 1, 1), theirs=lambda i: torch.ones(1, 1, 1), tensors=[a], batches=1)
    >>> losses = fb.RILQ(epochs=100, lr=0.1, truth=0)(matching)  # 0 at first, where 1 is wanted
    >>> losses[0], losses[-1] < 0.01
    (1.0, True)
    """

    epochs: int = 2
    lr: float = 5e-4
    truth: float = 0.5
    chunk: int = 256
    scope: ClassVar[Literal["block", "model"]] = "model"

    def __post_init__(self) -> None:
        family.check(self, epochs=self.epochs, lr=self.lr, chunk=self.chunk)
        if not 0 <= self.truth <= 1:
            raise Invalid(f"truth is {self.truth}; it is the share of the loss that the text itself has, from 0 to 1")

    def __call__(self, matching: Matching) -> list[float]:
        if self.truth and (matching.head is None or matching.learned is None):
            raise Invalid("RILQ learns from the text of a whole model, and no head came, or no text: use truth=0")
        return family.descend(matching, lambda i: self._loss(matching, i), self.epochs, self.lr)

    def _loss(self, matching: Matching, i: int) -> Tensor:
        ours = matching.ours(i)
        here = family.kept(matching, i, ours).float() - family.kept(matching, i, matching.theirs(i)).float()
        loss = (1 - self.truth) * here.square().mean()
        if matching.head is None or matching.learned is None or not self.truth:
            return loss
        states, words = matching.learned(i, ours)
        return loss + self.truth * family.surprise(states, words, matching.head, self.chunk)
