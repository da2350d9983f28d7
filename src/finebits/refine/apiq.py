"""ApiQ: Finetuning of 2-Bit Quantized Large Language Model.  Liao et al., EMNLP 2024.  arXiv:2402.05147v3.

Block by block (ApiQ-bw, section 4.2), with inputs X^q that come from the quantized blocks before it and X from the unquantized ones:

    argmin_{A, B}  ‖F(W, X) − F(Q + s·B A, X^q)‖²        over the adapters of all linears of the block F together

so that every block also makes good what the blocks before it lost, with one block in memory. Q learns as well where it is asked to:

    `clip`      the paper's: thresholds γ, β of every block of a weight that is rounded to nearest, σ(γ) max w and σ(β) min w    (section 4.1)
    `scales`    codes stay, and every block learns its scale (and its minimum, where the format holds one), which serves codes of any quantizer.
                That scales alone move is PEQA's, Kim et al., NeurIPS 2023, arXiv:2305.14152v2, and the second stage of EfficientQAT's, Chen et
                al., ACL 2025, arXiv:2407.11062v3

Deviations: the error of a token is divided by ‖F(W, X)‖², since a norm follows and a few tokens are a thousand times longer than the rest;
one threshold where a format has no minimum, and thresholds as shares of σ(4), so that nothing is clipped at first (the authors start at
σ(4) = .98); the adapters start where the plan's initialiser put them; Adam without weight decay. The authors' rates are 5e-4 for A and B and
5e-3 for the thresholds' logits, over 2560 steps; with few steps they need more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from finebits.errors import Invalid
from finebits.refine import _family as family
from finebits.refine.base import Matching, Refine


@dataclass(frozen=True)
class ApiQ(Refine):
    """`epochs` passes over the calibration batches for every block, at learning rates that fall from `lr` to 0; from `scales` for the scales, as
    shares of themselves, or from `clip` for the thresholds' logits: 0 leaves them alone.

    >>> from finebits.refine.base import Matching, Refine
    >>> a = torch.nn.Parameter(torch.zeros(1))
    >>> matching = Matching(ours=lambda i: a.expand(1, 1, 1), theirs=lambda i: torch.ones(1, 1, 1), tensors=[a], batches=1)
    >>> losses = fb.ApiQ(epochs=100, lr=0.1)(matching)  # 0 at first, where 1 is wanted
    >>> losses[0], losses[-1] < 0.01
    (1.0, True)
    """

    epochs: int = 4
    lr: float = 1e-3
    scales: float = 0.0
    clip: float = 0.0
    scope: ClassVar[Literal["block", "model"]] = "block"

    def __post_init__(self) -> None:
        family.check(self, epochs=self.epochs, lr=self.lr)
        if not (self.scales >= 0 and self.clip >= 0):
            raise Invalid(f"scales is {self.scales} and clip {self.clip}; they are learning rates, and 0 leaves scales or thresholds alone")
        if self.scales and self.clip:
            raise Invalid("codes stay under scales that learn, and follow thresholds that do: give scales or clip, not both")

    @property
    def moves(self) -> frozenset[str]:
        """Adapters, and scales or thresholds where they have a learning rate.

        >>> sorted(fb.ApiQ(scales=1e-3).moves)
        ['adapters', 'scales']
        """
        return frozenset({"adapters"} | ({"scales"} if self.scales else set()) | ({"clips"} if self.clip else set()))

    def __call__(self, matching: Matching) -> list[float]:
        loss = family.compared(matching, self.scope, "ApiQ", 0)
        return family.descend(matching, loss, self.epochs, self.lr, self.scales or self.clip)
