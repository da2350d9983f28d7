"""S2-LoRA: Sparsely Shared LoRA on Whisper for Child Speech Recognition.  Liu et al., ICASSP 2024.  arXiv:2309.11756v2.
Use it when few trained numbers are wanted, or what is learned is to hold outside of its data too: layers differ in r numbers each.

    W′_i = W_i + s·B diag(e_i) A,    B ∈ ℝ^{m×r},  A ∈ ℝ^{r×n} of all weights of one shape,  e_i ∈ ℝ^r of weight i, sparse,    s = α/r

All are trained. At birth A and B are Gaussian with deviation .02 and e = 0. That e becomes sparse is a rule's business.
Deviations: no code was published; the birth is AdaLoRA's, whose coefficients these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import LowRank
from finebits.adapters._product import product
from finebits.adapters.base import Layer, Params, complete
from finebits.qtensor import dense


@dataclass(frozen=True)
class S2LoRA(LowRank):
    """A low-rank update whose factors all weights of one shape hold together; each has its own coefficients ("gate").

    >>> adapter = fb.S2LoRA(rank=8)
    >>> adapter.size(64, 32), adapter.common(64, 32)  # r(m + n + 1) with the factors, which are there once
    (776, (768, 0))
    """

    rank: int = 32
    alpha: float = 32.0
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})
    shared: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A, B = (0.02 * torch.randn(shape, generator=gen) for shape in ((self.rank, n), (m, self.rank)))
        return complete({"A": A, "B": B, "gate": torch.zeros(self.rank)}, start, "S2LoRA")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return product(x, p["A"], p["B"] * p["gate"], self.s, base)

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return dense(W) + self.s * (p["B"] * p["gate"]) @ p["A"]  # zeros too: they have a gradient

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        """The update as a plain product L R over the coefficients that are not zero.

        >>> p = {"B": torch.ones(2, 2), "gate": torch.tensor([2.0, 0.0]), "A": torch.ones(2, 3)}
        >>> [tuple(factor.shape) for factor in fb.S2LoRA(rank=2).lowrank(p)]
        [(2, 1), (1, 3)]
        """
        on = p["gate"] != 0
        return self.s * (p["B"] * p["gate"])[:, on], p["A"][on]

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank), "gate": (self.rank,)}
