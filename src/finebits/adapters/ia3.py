"""IA³: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.  Liu et al., NeurIPS 2022.  arXiv:2205.05638v2.
Use it for very few trained numbers, tasks of few examples, and updates that vanish in the scales of a quantized base.

    side "output":  y = l ∘ (W x + b),    W′ = diag(l) W,    b′ = l ∘ b          keys and values
    side "input":   y = W (l ∘ x) + b,    W′ = W diag(l)                         the product that leaves a feed-forward block
                                                                                                              (section 3.3)
At birth l = 1. Where a recipe names no modules, these are the keys, the values, and the last product of the feed-forward block; a matrix
that makes queries beside them is scaled whole. Of modules that a recipe names, `feedforward` are of the second kind, all others of the first.
Deviations: none; a linear layer with a bias is scaled with it, as in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters.base import Form, Layer, Params, Rescaled, Role, complete
from finebits.errors import Invalid
from finebits.qtensor import dense

FEEDFORWARD = ("down_proj", "fc2", "w2", "c_proj", "dense_4h_to_h", "wo")


@dataclass(frozen=True)
class IA3(Usual):
    """A factor for every output, or for every input, of a layer. `feedforward` are last parts of the names of modules whose inputs are scaled.

    >>> fb.IA3("input").merged({"l": torch.tensor([1.0, 3.0])}, torch.ones(2, 2))
    tensor([[1., 3.],
            [1., 3.]])
    >>> fb.IA3().at("model.layers.0.mlp.down_proj").side
    'input'
    """

    side: Literal["output", "input"] = "output"
    feedforward: tuple[str, ...] = FEEDFORWARD
    rank: ClassVar[int] = 0
    form: ClassVar[Form] = "scaled"
    roles: ClassVar[frozenset[Role] | None] = frozenset({"keys", "values", "feed_forward_output"})
    drops: ClassVar[bool] = False
    kept: ClassVar[frozenset[str]] = frozenset({"l"})

    def __post_init__(self) -> None:
        if self.side not in ("output", "input"):
            raise Invalid(f"side is {self.side!r}; it can be 'output' or 'input'")

    def in_role(self, roles: frozenset[Role]) -> IA3:
        return replace(self, side="input") if "feed_forward_output" in roles else self

    def at(self, module: str) -> IA3:
        return replace(self, side="input") if module.rpartition(".")[2] in self.feedforward else self

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        return complete({k: torch.ones(shape) for k, shape in self.shapes(*base.weight.shape).items()}, start, "IA3")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        wide = x.float()  # 16 bits round what a factor near 1 changes away
        return (base(wide) * p["l"] if self.side == "output" else base(wide * p["l"])).to(x.dtype)

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return dense(W) * (p["l"][:, None] if self.side == "output" else p["l"])

    def scaled(self, p: Params, W: Float[Tensor, "m n"]) -> Rescaled:
        """Rows or columns alone."""
        m, n = W.shape
        rows, columns = (p["l"], None) if self.side == "output" else (None, p["l"])
        return Rescaled(rows, columns, p["l"].new_zeros(m, 0), p["l"].new_zeros(0, n))

    def bias(self, p: Params, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.side == "input" else p["l"] * b

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"l": (m if self.side == "output" else n,)}
