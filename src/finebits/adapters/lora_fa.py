"""LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning.  Zhang et al., 2023.  arXiv:2308.03303v1.
Use it when activations are what does not fit: of a layer's input r numbers a token are kept for the backward pass.

    W′ = W + s·B A,    A ∈ ℝ^{r×n} frozen,  B ∈ ℝ^{m×r} trained,    ∂L/∂B = s·gᵀ (x Aᵀ),    s = α/r

It is LoRA whose A stays as it was born or started. At birth B = 0 and A is uniform in ±1/√n.
Deviations: the paper draws A from a Gaussian; the range above is LoRA's, so that both start alike.
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


@dataclass(frozen=True)
class LoRAFA(LowRank):
    """A low-rank update of which B alone is trained.

    >>> adapter = fb.LoRAFA(rank=16)
    >>> adapter.size(3072, 1024), adapter.stored(3072, 1024)  # r·m trained, r·n beside them
    (49152, 16384)
    """

    rank: int = 16
    alpha: float = 16.0
    frozen: ClassVar[frozenset[str]] = frozenset({"A"})

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n)
        return complete({"A": A, "B": torch.zeros(m, self.rank)}, start, "LoRAFA")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return product(x, p["A"], p["B"], self.s, base)

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * p["B"], p["A"]

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank)}
