"""EfficientQAT: Efficient Quantization-Aware Training for Large Language Models.  Chen et al., ACL 2025.  arXiv:2407.11062v3.
Use it for integers of 2 and 3 bits, first blocks, then the model, where calibration rows are many: apiq moves less and fits few rows less.

Block-AP (section 3.2): block by block, all that its weights are made of learns what the unquantized block does, by rounding straight through:

    W_int = clamp(⌊W/s⌉ + z, 0, 2^N − 1),  Ŵ = (W_int − z)·s    (eqs. 1, 2)        argmin_{W, s, z} ‖F(W, X) − F(Ŵ, X^q)‖²

and is then hardened to its codes, so that one block at a time is dense. E2E-QP (section 3.3): codes stay, and the scales of all blocks learn
together. `scope` says which: "block" is the first stage, "model" the second, and a recipe lists both.

Deviations: W starts in the cell of the code that the quantizer gave it, so that GPTQ's codes serve as well as rounding to nearest; it is held in
steps of its grid and scales as shares of themselves, and their learning rates are in these; a real minimum, where a format has one, learns in
both stages; adapters stay as they are; the error of a token of a block is divided by its norm, as in ApiQ; E2E-QP follows the unquantized
model's outputs, where the paper follows the text, which few rows would fit. The paper's rates, 2e-5 for weights and 1e-4 for scales over 4096
steps, are a thousandth of a step of the grid and a hundredth of a scale; few steps need more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finebits.errors import Invalid
from finebits.refine import _family as family
from finebits.refine.base import Matching, Refine


@dataclass(frozen=True)
class EfficientQAT(Refine):
    """`epochs` passes over the calibration batches, of every block or of the model, at learning rates that fall to 0: of weights from `lr`, of
    scales and zero points from `scales`. `chunk` bounds the logits that exist at once.

    >>> from finebits.refine.base import Matching, Refine
    >>> a = torch.nn.Parameter(torch.zeros(1))
    >>> matching = Matching(ours=lambda i: a.expand(1, 1, 1), theirs=lambda i: torch.ones(1, 1, 1), tensors=[a], batches=1)
    >>> losses = fb.EfficientQAT(epochs=100, lr=0.1)(matching)  # 0 at first, where 1 is wanted
    >>> losses[0], losses[-1] < 0.01
    (1.0, True)
    """

    epochs: int = 4
    lr: float = 2e-2
    scales: float = 2e-3
    chunk: int = 256
    scope: Literal["block", "model"] = "block"  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        family.check(self, epochs=self.epochs, lr=self.lr, scales=self.scales, chunk=self.chunk)
        if self.scope not in ("block", "model"):
            raise Invalid(f"scope is {self.scope!r}; Block-AP has the scope block, E2E-QP the scope model")

    @property
    def moves(self) -> frozenset[str]:
        """Weights with their scales in a block, scales alone in the model.

        >>> sorted(fb.EfficientQAT().moves), sorted(fb.EfficientQAT(scope="model").moves)
        (['scales', 'weights'], ['scales'])
        """
        return frozenset({"scales", "weights"} if self.scope == "block" else {"scales"})

    def __call__(self, matching: Matching) -> list[float]:
        loss = family.compared(matching, self.scope, "EfficientQAT", self.chunk)
        return family.descend(matching, loss, self.epochs, self.lr, self.scales)
