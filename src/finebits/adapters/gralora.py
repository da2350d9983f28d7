"""GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning.  Jung et al., NeurIPS 2025.  arXiv:2505.20355v1.
Use it where LoRA stops gaining with rank: the same numbers in k × k blocks of the weight, whose update has k times the rank.

    W′_ji = W_ji + s·B_ji A_ji,    B_ji ∈ ℝ^{m/k×r/k},  A_ji ∈ ℝ^{r/k×n/k},    s = α/(r + h)
    hybrid:  W′ += s·B A of rank h over all of W

A_1i … A_ki are stacked to A[i] (r, n/k), and B_j1 … B_jk stand side by side in B[j] (m/k, r). At birth B = 0, and A is uniform in ±1/√ of how
many inputs it has. The whole is a product of rank k·r (+ h), which is how it is exported.
Deviations: PEFT holds A[i] and B[j] transposed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import LowRank
from finebits.adapters.base import Layer, Params, complete
from finebits.errors import Invalid


@dataclass(frozen=True)
class GraLoRA(LowRank):
    """Low-rank updates of `k` × `k` blocks, with as many numbers as one of rank `rank`; `hybrid` is the rank of one over the whole weight.

    >>> fb.GraLoRA(rank=32, k=4).size(4096, 4096) == fb.LoRA(rank=32).size(4096, 4096)
    True
    """

    rank: int = 32
    alpha: float = 64.0
    k: int = 2
    hybrid: int = 0
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or self.hybrid < 0:
            raise Invalid(f"k is {self.k} and hybrid {self.hybrid}; there is at least one block a side, and no rank below 0")
        if self.rank % self.k:
            raise Invalid(f"GraLoRA parts its rank among k = {self.k} blocks, which do not divide {self.rank}: choose a multiple of k")

    @property
    def s(self) -> float:
        return self.alpha / (self.rank + self.hybrid)

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        own = Params()
        for name, shape in self.shapes(*base.weight.shape).items():
            uniform = name.startswith("A")
            own[name] = (torch.rand(shape, generator=gen) * 2 - 1) / math.sqrt(shape[-1]) if uniform else torch.zeros(shape)
        return complete(own, start, "GraLoRA")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        z = base.drop(x)
        A, B = self._parts(p)
        h = torch.einsum("...in,ijqn->...jiq", z.unflatten(-1, (self.k, z.shape[-1] // self.k)), A)
        update = torch.einsum("...jiq,jmiq->...jm", h, B)
        y = base(x) + self.s * update.flatten(-2)
        return y + F.linear(F.linear(z, p["A_whole"]), self.s * p["B_whole"]) if self.hybrid else y

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        """Rows of R by (i, j, q): A_ji's at the i-th inputs; columns of L in the same order: B_ji's at the j-th outputs."""
        (A, B), k = self._parts(p), self.k
        eye = torch.eye(k, dtype=A.dtype, device=A.device)
        R = torch.einsum("ijqn,iI->ijqIn", A, eye).reshape(k * self.rank, -1)
        L = torch.einsum("jmiq,jJ->jmiJq", B, eye).reshape(-1, k * self.rank)
        return (torch.cat([self.s * L, self.s * p["B_whole"]], 1), torch.cat([R, p["A_whole"]])) if self.hybrid else (self.s * L, R)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        if m % self.k or n % self.k:
            raise Invalid(f"GraLoRA cuts a weight into {self.k} × {self.k} equal blocks, and this one is {m} × {n}: choose another k")
        whole = {"A_whole": (self.hybrid, n), "B_whole": (m, self.hybrid)} if self.hybrid else {}
        return {"A": (self.k, self.rank, n // self.k), "B": (self.k, m // self.k, self.rank), **whole}

    def _parts(self, p: Params) -> tuple[Tensor, Tensor]:
        """A_ji as (i, j, q, n/k), B_ji as (j, m/k, i, q), with q = 1 … r/k."""
        A, B, k = p["A"], p["B"], self.k
        return A.view(k, k, -1, A.shape[-1]), B.view(k, B.shape[1], k, -1)
