"""One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning.  Zhou et al., 2025.  arXiv:2501.16720v1.
Use it when LoRA's own rank is to be small and B is to learn faster than A: it is LoRA of rank r/k whose B has k times the learning rate.

    W′ = W + s·(B_1 + … + B_k) A_s,    B_i ∈ ℝ^{m×r/k},  A_s ∈ ℝ^{r/k×n},    s = α/(r/k)

LoRA's A is cut into k blocks of rows, of which one, A_s, stands for all; B = [B_1 … B_k] stays as large as it was. At birth B = 0 and A_s is
uniform in ±1/√n. All B_i meet the same inputs and the same gradients, so that equal ones stay equal under any optimizer that works number by
number: k of them take k steps where LoRA's takes one. The authors count r(m + n/k) trained numbers; what they train is of rank r/k.
Deviations: `rank` is r/k, the rank of the update, and s has it as its divisor, so that k changes neither. No code was published; this is the
paper's text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import LowRank
from finebits.adapters._product import product
from finebits.adapters.base import Layer, Params, complete
from finebits.errors import Invalid


@dataclass(frozen=True)
class BlockLoRA(LowRank):
    """One A of `rank` rows under the sum of `blocks` blocks of B.

    >>> p = {"A": torch.tensor([[0.0, 3.0]]), "B": torch.tensor([[1.0, 1.0], [0.0, 4.0]])}  # B_1 | B_2
    >>> fb.BlockLoRA(rank=1, alpha=1, blocks=2).merged(p, torch.eye(2))
    tensor([[ 1.,  6.], [ 0., 13.]])
    """

    rank: int = 2
    alpha: float = 2.0
    blocks: int = 2
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1:
            raise Invalid(f"blocks is {self.blocks}; it must be at least 1")

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n)
        return complete({"A": A, "B": torch.zeros(m, self.blocks * self.rank)}, start, "BlockLoRA")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return product(x, p["A"], self._sum(p["B"]), self.s, base)

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * self._sum(p["B"]), p["A"]

    def _sum(self, B: Float[Tensor, "m kr"]) -> Float[Tensor, "m r"]:
        return B.reshape(-1, self.blocks, self.rank).sum(1)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.blocks * self.rank)}
