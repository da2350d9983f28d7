"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters.  Bałazy et al., ECAI 2025.  arXiv:2405.17604v3.
Use it where many adapters are kept or sent: r² numbers a matrix, whatever its size.

    W′ = W + s·B R A,    B = U_r ∈ ℝ^{m×r},  A = V_rᵀ ∈ ℝ^{r×n}  of W = U Σ Vᵀ, both frozen,    R ∈ ℝ^{r×r} trained,    s = α/r

At birth R = 0. An initialiser may give all three (LoRA-SB), or B and A: then R = 1.
Deviations:
- R = 0 where the paper draws R from N(0, 10⁻¹⁰): its gradient does not vanish there, and the start is W exactly;
- A = V_rᵀ without Σ_r: then B and A are orthonormal and the gradient of R is the projection of W's; the paper has Σ_r in one of them, which
  makes the learning rate depend on the size of W;
- where the weight has less than r directions, the rest of B and A is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import LowRank
from finebits.adapters.base import Layer, Params, complete
from finebits.linalg import top_svd
from finebits.qtensor import dense


@dataclass(frozen=True)
class LoRAXS(LowRank):
    """r² trained numbers between two frozen factors.

    >>> from finebits.adapters.base import Base
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> p = fb.LoRAXS(rank=1, alpha=1).params(Base(W), torch.Generator(), {})
    >>> p["B"] @ p["A"], p["R"]  # the first direction of W, and nothing in it yet
    (tensor([[1., 0.], [0., 0.]]), tensor([[0.]]))
    """

    rank: int = 64
    alpha: float = 64.0
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    own: ClassVar[str] = "zeros"
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros", "lora_sb"})

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        own = {"A": torch.zeros(self.rank, n), "B": torch.zeros(m, self.rank), "R": torch.zeros(self.rank, self.rank)}
        if self.frozen <= start.keys():
            own["R"] = torch.eye(self.rank)
        else:
            W = dense(base.weight, torch.float32).detach()
            U, _, Vh, _ = top_svd(W, min(self.rank, m, n))
            own["A"][: len(Vh)], own["B"][:, : len(Vh)] = Vh, U
        return complete(own, start, "LoRAXS")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return base(x) + F.linear(F.linear(F.linear(base.drop(x), p["A"]), p["R"]), self.s * p["B"])

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * p["B"] @ p["R"], p["A"]

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank), "R": (self.rank, self.rank)}
