"""Structured LoRA: NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models.  Guo et al., 2025.  arXiv:2502.14482v1.
With LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation.  Azizi et al., EMNLP 2024.  arXiv:2406.12832v1.
Use it with train="core" for r² trained numbers between factors of the weight, with train="left" for activations of r numbers a token.

    W′ = W + s·B N A,    B ∈ ℝ^{m×r},  N ∈ ℝ^{r×r},  A ∈ ℝ^{r×n},    s = α/r

train="all" is SLoRA, "core" (N alone) is IntTune, "left" (B and N) is LaMDA. At birth B = 0, A and N are uniform in ±1/√n and ±1/√r; where only
N is trained, B is Gaussian of deviation 1/√r and N = 0. An initialiser that starts A and B gets N = 1.
Deviations: LaMDA's own start is init `lamda`, NLoRA's is init `nlora`; LaMDA's freezing of B's columns is rule `lamda_freeze`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import LowRank
from finebits.adapters.base import Layer, Params, complete
from finebits.errors import Invalid

STILL: dict[str, frozenset[str]] = {"all": frozenset(), "core": frozenset({"A", "B"}), "left": frozenset({"A"})}


@dataclass(frozen=True)
class SLoRA(LowRank):
    """A low-rank update with a trained matrix in the middle; `train` is "all", "core" or "left".

    >>> p = {"B": torch.tensor([[1.0], [0.0]]), "N": torch.tensor([[2.0]]), "A": torch.tensor([[0.0, 3.0]])}
    >>> fb.SLoRA(rank=1, alpha=1).merged(p, torch.eye(2))
    tensor([[1., 6.], [0., 1.]])
    >>> fb.SLoRA(rank=16, train="core").size(4096, 4096)  # N alone
    256
    """

    rank: int = 16
    alpha: float = 16.0
    train: Literal["all", "core", "left"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train not in STILL:
            raise Invalid(f"train is {self.train!r}; it can be {', '.join(map(repr, STILL))}")

    @property
    def own(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """SLoRA's, IntTune's and LaMDA's.

        >>> [fb.SLoRA(train=train).own for train in ("all", "core", "left")]
        ['zeros', 'nlora', 'lamda']
        """
        return {"all": "zeros", "core": "nlora", "left": "lamda"}[self.train]

    @property
    def frozen(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What is stored and not trained.

        >>> sorted(fb.SLoRA(train="core").frozen)
        ['A', 'B']
        """
        return STILL[self.train]

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        r = self.rank
        A, N = torch.rand(r, n, generator=gen) * 2 - 1, torch.rand(r, r, generator=gen) * 2 - 1
        own = {"A": A / math.sqrt(n), "N": N / math.sqrt(r), "B": torch.zeros(m, r)}
        if self.train == "core":
            own |= {"B": torch.randn(m, r, generator=gen) / math.sqrt(r), "N": torch.zeros(r, r)}
        if {"A", "B"} <= start.keys():
            own["N"] = torch.eye(r)
        return complete(own, start, "SLoRA")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return base(x) + F.linear(F.linear(F.linear(base.drop(x), p["A"]), p["N"]), self.s * p["B"])

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * p["B"] @ p["N"], p["A"]

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank), "N": (self.rank, self.rank)}
