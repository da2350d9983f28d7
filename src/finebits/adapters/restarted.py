"""ReLoRA: High-Rank Training Through Low-Rank Updates (the weight).  Lialin et al., ICLR 2024.  arXiv:2307.05695v4.
Use it with rule `relora`, which starts the update anew several times in a run and keeps what was learned.

    W′ = W + s·(B A + B₀ A₀),    B ∈ ℝ^{m×r},  A ∈ ℝ^{r×n},  B₀ ∈ ℝ^{m×kr},  A₀ ∈ ℝ^{kr×n},    s = α/r

B and A are trained; B₀ and A₀ hold the k updates that are finished, frozen, and are zero until then. At birth B = 0 and A is uniform in
±1/√n.
Deviations: the paper adds finished updates to W (rule `relora` says why they are kept beside it here).
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
class Restarted(LowRank):
    """A low-rank update of rank `rank`, with room for `slots` that are finished.

    >>> adapter = fb.Restarted(rank=1, alpha=1, slots=1)
    >>> p = {"A": torch.tensor([[1.0, 0.0]]), "B": torch.ones(1, 1), "A0": torch.tensor([[0.0, 1.0]]), "B0": torch.ones(1, 1)}
    >>> adapter.merged(p, torch.zeros(1, 2)), adapter.size(4096, 4096), adapter.stored(4096, 4096)
    (tensor([[1., 1.]]), 8192, 8192)
    """

    rank: int = 16
    alpha: float = 16.0
    slots: int = 3
    frozen: ClassVar[frozenset[str]] = frozenset({"A0", "B0"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1:
            raise Invalid(f"slots is {self.slots}; there must be room for one finished update or more")

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n)
        zeros = {k: torch.zeros(shape) for k, shape in self.shapes(m, n).items()}
        return complete(zeros | {"A": A}, start, "Restarted")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        L, R = self.lowrank(p)
        return base(x) + F.linear(F.linear(base.drop(x), R), L)

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * torch.cat([p["B"], p["B0"]], 1), torch.cat([p["A"], p["A0"]], 0)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        k = self.slots * self.rank
        return {"A": (self.rank, n), "B": (m, self.rank), "A0": (k, n), "B0": (m, k)}
