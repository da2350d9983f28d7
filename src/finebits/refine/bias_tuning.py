"""Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming (bias tuning).  Hubara et al., ICML 2021.
arXiv:2006.10518v2.

The vectors of the quantized model alone are trained to do what the unquantized one does (section 3.4):

    min_b  Σ_t KL(softmax(H h_t) ‖ softmax(H ĥ_t))

over positions t, with h, ĥ the final states of the unquantized and the quantized model and H the head. Weights, codes, scales and adapters
are left alone.
Deviations: biases and the gains of norms, which is what language models have (many have no bias at all); clipping thresholds are not
trained, since they are the scales here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from finebits.refine import _family as family
from finebits.refine.base import Matching, Refine


@dataclass(frozen=True)
class BiasTuning(Refine):
    """`epochs` passes over the calibration batches; `chunk` bounds the logits that exist at once and changes no result.

    >>> from finebits.refine.base import Matching, Refine
    >>> b, goal = torch.nn.Parameter(torch.zeros(1)), torch.full((1, 1, 1), 3.0).log()
    >>> two = lambda h: torch.cat([h, torch.zeros_like(h)], -1)  # logits of two words
    >>> matching = Matching(ours=lambda i: b.expand(1, 1, 1), theirs=lambda i: goal, tensors=[b], batches=1, head=two)
    >>> losses = fb.BiasTuning(epochs=100, lr=0.1)(matching)
    >>> round(losses[0], 4), losses[-1] < 0.01  # KL of (1/2, 1/2) from (3/4, 1/4): 3/4 ln 3/2 − 1/4 ln 2
    (0.1308, True)
    """

    epochs: int = 10
    lr: float = 1e-3
    chunk: int = 256
    scope: ClassVar[Literal["block", "model"]] = "model"
    moves: ClassVar[frozenset[str]] = frozenset({"vectors"})

    def __post_init__(self) -> None:
        family.check(self, epochs=self.epochs, lr=self.lr, chunk=self.chunk)

    def __call__(self, matching: Matching) -> list[float]:
        return family.descend(matching, family.compared(matching, self.scope, "BiasTuning", self.chunk), self.epochs, self.lr)
