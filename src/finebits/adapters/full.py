"""Full fine-tuning: Universal Language Model Fine-tuning for Text Classification.  Howard & Ruder, ACL 2018.  arXiv:1801.06146v5.
Use it with optimizers that save memory, such as galore, or where everything fits: no update is richer, and none takes more.

    W′ = W, which is trained itself

A weight in codes is trained too: its gradient is that of the dense weight, and once the optimizer has moved it, it is rounded again, up or down
at random so that its mean is what it was to be (`finebits.rewrite`). Nothing dense is held of it but while it moves.
Deviations: none. What is no planned matrix (embeddings, norms, a head) is trained where modules_to_save names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters.base import Form, Layer, Params, complete
from finebits.qtensor import dense


@dataclass(frozen=True)
class Full(Usual):
    """The weight itself, and no tensors beside it.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.Int(8), adapter=fb.Full())}))
    >>> [(name, type(p.data).__name__) for name, p in model.named_parameters() if p.requires_grad]
    [('0.weight', 'QTensor')]
    """

    rank: ClassVar[int] = 0
    itself: ClassVar[bool] = True
    drops: ClassVar[bool] = False
    form: ClassVar[Form] = "weight"

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {}

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        return complete({}, start, "Full")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return base(x)

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return dense(W)
