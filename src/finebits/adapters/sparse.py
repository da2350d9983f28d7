"""Sparse High Rank Adapters (SHiRA).  Bhardwaj et al., NeurIPS 2024.  arXiv:2406.13175v2.
Rows and columns: S²FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity.  Yang et al., NeurIPS 2024.
arXiv:2412.06289v3.
Use it to move a small part of the weight and leave all else as it is, to the bit: no factor is shared between tasks.

    W′ = W + D,    D = delta at a fixed choice of   r (m + n) entries   |   r rows   |   r columns of W,    0 elsewhere

The choice is random, or of the largest |w|, ‖row‖, ‖column‖. At birth delta = 0. Rows and columns are products of rank r.
Deviations: the values are added to the weight that is there, of codes too, where the authors train the numbers of the weight itself; neurons
stay in their order, which S²FT changes. Which layers have any is said by target_modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters._picked import columns, moved, product, rows
from finebits.adapters._rows import made
from finebits.adapters.base import Form, Layer, Params, Rescaled, check_scale, complete
from finebits.errors import Invalid
from finebits.qtensor import dense


@dataclass(frozen=True)
class Sparse(Usual):
    """`rank` rows or columns of a weight, or as many entries as a LoRA of this rank has numbers; "index" says which.

    >>> p = {"delta": torch.tensor([[2.0, 3.0]]), "index": torch.tensor([1])}
    >>> fb.Sparse("rows", rank=1).merged(p, torch.ones(2, 2))
    tensor([[1., 1.],
            [3., 4.]])
    >>> fb.Sparse("entries", rank=32).size(3072, 3072) == fb.LoRA(rank=32).size(3072, 3072)
    True
    """

    part: Literal["entries", "rows", "columns"] = "entries"
    by: Literal["random", "magnitude"] = "random"
    rank: int = 16
    frozen: ClassVar[frozenset[str]] = frozenset({"index"})
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})

    def __post_init__(self) -> None:
        check_scale(self.rank, 1.0)
        if self.part not in ("entries", "rows", "columns"):
            raise Invalid(f"part is {self.part!r}; it can be 'entries', 'rows' or 'columns'")
        if self.by not in ("random", "magnitude"):
            raise Invalid(f"by is {self.by!r}; it can be 'random' or 'magnitude'")

    @property
    def form(self) -> Form:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "weight" if self.part == "entries" else "scaled"

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        shapes = self.shapes(*base.weight.shape)
        index = self._chosen(base, gen, *shapes["index"]).sort().values.int()
        return complete({"delta": torch.zeros(shapes["delta"]), "index": index}, start, "Sparse")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        V, at = p["delta"], p["index"].long()
        if self.part != "entries":
            return (rows if self.part == "rows" else columns)(x, V, at, base)
        m, n = base.shape

        def make(few: slice, V: Tensor) -> Tensor:
            return _scattered(V, at, few, n)

        return base(x) + made(base.drop(x), m, make, V)

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        V, at, (m, n) = p["delta"], p["index"].long(), W.shape
        if self.part == "entries":
            return dense(W) + _scattered(V, at, slice(0, m), n)
        return moved(dense(W), V, at, self.part)

    def scaled(self, p: Params, W: Float[Tensor, "m n"]) -> Rescaled:
        """One-hot rows and the values, or the values and one-hot columns."""
        return product(p["delta"], p["index"].long(), W, "rows" if self.part == "rows" else "columns")

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        if self.part == "entries" and m * n >= 2**31:
            raise Invalid(f"places in a weight are counted with 31 bits, and {m} × {n} are more: take rows or columns of it")
        many = {"entries": min(self.rank * (m + n), m * n), "rows": min(self.rank, m), "columns": min(self.rank, n)}[self.part]
        return {"delta": {"entries": (many,), "rows": (many, n), "columns": (m, many)}[self.part], "index": (many,)}

    def _chosen(self, base: Layer, gen: Generator, many: int) -> Tensor:
        m, n = base.weight.shape
        if self.by == "random":
            return torch.randperm({"entries": m * n, "rows": m, "columns": n}[self.part], generator=gen)[:many]
        W = dense(base.weight, torch.float32).detach().cpu()
        size = W.square().view(-1) if self.part == "entries" else W.square().sum(1 if self.part == "rows" else 0)
        return size.argsort(descending=True)[:many]


def _scattered(V: Float[Tensor, " k"], at: Tensor, rows: slice, n: int) -> Float[Tensor, "t n"]:
    """Rows of D; what lies in others falls into a place behind the last."""
    many = (rows.stop - rows.start) * n
    place = at - rows.start * n
    place = torch.where((place >= 0) & (place < many), place, many)
    return V.new_zeros(many + 1).scatter_add(0, place, V)[:many].view(-1, n)
