"""PaCA: Partial Connection Adaptation for Efficient Fine-Tuning.  Woo et al., ICLR 2025.  arXiv:2503.01905v2.
Use it when activations are what does not fit and time counts: of a layer's input r numbers a token are kept, and one small product is added.

    W′ = W + s·D E,    D ∈ ℝ^{m×r} trained,    E ∈ {0, 1}^{r×n} picks r columns, drawn once,    s = α/r

The authors train P = W Eᵀ/s + D in the place of these columns; ∂L/∂D = s·gᵀ (x Eᵀ) needs r columns of x alone. At birth D = 0.
Deviations: what is trained is the difference D, which starts at zero: then the base, quantized or not (QPaCA), keeps what it holds, and weight
decay pulls towards W. E is drawn from the seed and not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import LowRank
from finebits.adapters._picked import columns
from finebits.adapters.base import Layer, Params, complete
from finebits.errors import Invalid


@dataclass(frozen=True)
class PaCA(LowRank):
    """Of the columns of the weight, in an order of their own ("columns"), the first `rank` are trained.

    >>> p = {"D": torch.tensor([[1.0], [2.0]]), "columns": torch.tensor([2, 0, 1])}
    >>> fb.PaCA(rank=1, alpha=1).merged(p, torch.zeros(2, 3))
    tensor([[0., 0., 1.], [0., 0., 2.]])
    """

    rank: int = 16
    alpha: float = 64.0
    frozen: ClassVar[frozenset[str]] = frozenset({"columns"})
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        return complete({"D": torch.zeros(self.shapes(*base.weight.shape)["D"])}, start, "PaCA")

    def buffers(self, base: Layer, gen: Generator) -> Params:
        return {"columns": torch.randperm(base.weight.shape[1], generator=gen).int()}

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return columns(x, p["D"], self._at(p), base, self.s)

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * p["D"], F.one_hot(self._at(p), len(p["columns"])).to(p["D"].dtype)

    def _at(self, p: Params) -> Tensor:
        return p["columns"][: self.rank].long()

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        if self.rank > n:
            raise Invalid(f"PaCA trains {self.rank} columns (rank), and a {m}x{n} weight has {n}: lower rank, or leave the module out")
        return {"D": (m, self.rank), "columns": (n,)}
