"""Gated low-rank update: the architecture under AdaLoRA (Zhang et al., ICLR 2023, arXiv:2303.10512v2), IncreLoRA and SoRA.
Use it with a rule that opens and closes directions (adalora, increlora, sora): the rank of every matrix is then found while training.

    W′ = W + s·B diag(λ) A,    B ∈ ℝ^{m×r},  λ ∈ ℝ^r,  A ∈ ℝ^{r×n},    s = α/r

AdaLoRA writes P Λ Q for B diag(λ) A (eq. 3). At birth A and B are Gaussian with deviation .02 and λ = 0; an initialiser that starts A and B
gets λ = 1. Which of the λ are open is a rule's business: the shapes never change.
Deviations: s has the constant r of birth, where the authors divide by the rank of the moment, so that closing one λ rescales no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from finebits.adapters._family import LowRank
from finebits.adapters.base import Layer, Params, complete
from finebits.qtensor import dense


@dataclass(frozen=True)
class Gated(LowRank):
    """A low-rank update whose `rank` directions each have a gate λ.

    >>> p = {"B": torch.tensor([[1.0], [0.0]]), "gate": torch.tensor([2.0]), "A": torch.tensor([[0.0, 3.0]])}
    >>> fb.Gated(rank=1, alpha=1).merged(p, torch.eye(2))
    tensor([[1., 6.], [0., 1.]])
    """

    rank: int = 12
    alpha: float = 12.0
    frozen: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[str] = "zeros"

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = 0.02 * torch.randn(self.rank, n, generator=gen)
        B = 0.02 * torch.randn(m, self.rank, generator=gen)
        gate = torch.ones(self.rank) if "A" in start and "B" in start else torch.zeros(self.rank)
        return complete({"A": A, "B": B, "gate": gate}, start, "Gated")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return base(x) + F.linear(F.linear(base.drop(x), p["A"]) * p["gate"], self.s * p["B"])

    def rows(self, p: Params, ids: Int[Tensor, "*t"], E: Float[Tensor, "*t n"]) -> Float[Tensor, "*t n"]:
        return E + self.s * (F.embedding(ids, p["B"]) * p["gate"]) @ p["A"]

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return dense(W) + self.s * (p["B"] * p["gate"]) @ p["A"]  # closed gates too: they have a gradient

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        """The update as a plain product L R over the open gates.

        >>> p = {"B": torch.ones(2, 2), "gate": torch.tensor([2.0, 0.0]), "A": torch.ones(2, 3)}
        >>> L, R = fb.Gated(rank=2, alpha=2).lowrank(p)
        >>> L, tuple(R.shape)  # one gate is closed
        (tensor([[2.], [2.]]), (1, 3))
        """
        on = p["gate"] != 0
        return self.s * (p["B"] * p["gate"])[:, on], p["A"][on]

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank), "gate": (self.rank,)}
