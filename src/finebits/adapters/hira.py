"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models.  Huang et al., ICLR 2025.  OpenReview TwJrTz9cRS.
Use it where LoRA's rank is what limits it: as many numbers as LoRA, and an update whose rank is that of W.

    W′ = W + W ∘ (B A),    B ∈ ℝ^{m×r},  A ∈ ℝ^{r×n}

At birth B = 0 and A is uniform in ±1/√n. W ∘ (B A) is made a few rows at a time, in the forward and in the backward pass, of codes where W is
held in codes.
Deviations: no scale stands before B A, as in the paper and in PEFT; a base under another adapter is taken dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters._rows import made, some, tiled
from finebits.adapters.base import Layer, Params, check_scale, complete
from finebits.qtensor import dense


@dataclass(frozen=True)
class HiRA(Usual):
    """The weight times a low-rank matrix, number by number.

    >>> p = {"B": torch.tensor([[1.0], [0.0]]), "A": torch.tensor([[1.0, 2.0]])}
    >>> fb.HiRA(rank=1).merged(p, torch.tensor([[1.0, 1.0], [5.0, 5.0]]))
    tensor([[2., 3.],
            [5., 5.]])
    """

    rank: int = 32
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})

    def __post_init__(self) -> None:
        check_scale(self.rank, 1.0)

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n)
        return complete({"A": A, "B": torch.zeros(m, self.rank)}, start, "HiRA")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        A, B, W, z = p["A"], p["B"], base.weight, base.drop(x)
        if not tiled(base):
            return base(x) + F.linear(z, dense(W).to(z.dtype) * (B @ A).to(z.dtype))

        def make(rows: slice, A: Tensor, B: Tensor) -> Tensor:
            return some(W, rows, A.dtype) * (B[rows] @ A)

        return base(x) + made(z, W.shape[0], make, A, B)

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return dense(W) * (1 + p["B"] @ p["A"])

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank)}
