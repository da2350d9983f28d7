"""APOLLO: SGD-like Memory, AdamW-level Performance.  Zhu et al., MLSys 2025.  arXiv:2412.05270v4.
Use it where even galore's state is too much, or its search for a basis too slow: rank 1 (APOLLO-Mini) costs next to nothing.

For a gradient G (m, n), m < n (else all transposed), with P (r, m) of normal numbers of variance 1/r, drawn anew every T steps:

    R = P G,    N = ρ(R)                                            ρ is Adam, whose state has the shape of R
    s_j = ‖N_:j‖ / ‖R_:j‖   (APOLLO),    s = ‖N‖ / ‖R‖   (APOLLO-Mini)
    W ← W − η α · limit(G · diag(s)),    limit: no longer than γ times the last one

Adam thus says only how far each channel goes, and the gradient itself where to. α makes up for norms that a narrower look shortens: √128 for
Mini. P is drawn from a seed, and is no state.

Deviations: weights whose shorter sides are equal share P, so that it is drawn once; the last four are kept. At r ≥ min(m, n) the weight goes
to the inner optimizer as it is, times α.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.optim._projected import Transformed, along, project, proxy, ratio, shortened, squares
from finebits.optim._shell import State
from finebits.optim.base import Optimizer


@dataclass(frozen=True)
class APOLLO(Transformed):
    """`rank` is r, `gap` T, `growth` γ, `inner` ρ. Where they are not given, `scaling` is "tensor" at rank 1 and "channel" above,
    and `scale`, α, is √128 and 1.

    >>> APOLLO(rank=1).matrix(64, 96), APOLLO(rank=1).scale == 128**0.5  # bytes: two moments of 1 x 96
    (768, True)
    >>> W = torch.nn.Parameter(torch.zeros(2, 3))
    >>> W.grad = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    >>> APOLLO(rank=1, inner="sgd", scale=1.0).make([W], lr=1.0).step()  # SGD goes as far as the gradient is long
    >>> W.data
    tensor([[ 0.,  0., -2.],
            [ 0.,  0.,  0.]])
    """

    rank: int = 256
    gap: int = 200
    scaling: Literal["channel", "tensor"] | None = None
    scale: float | None = None
    growth: float = 1.01
    seed: int = 0
    inner: str | Optimizer = "adamw"
    layerwise: bool = False
    label: ClassVar[str] = "APOLLO"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.growth >= 1:
            raise Invalid(f"APOLLO lets an update grow by a factor of growth a step, 1 or more; got {self.growth}")
        if self.scaling is None:
            object.__setattr__(self, "scaling", "tensor" if self.rank == 1 else "channel")
        if self.scale is None:
            object.__setattr__(self, "scale", math.sqrt(128) if self.scaling == "tensor" else 1.0)

    def before(self, G: Float[Tensor, "m n"], state: State) -> Tensor:
        s = min(G.shape)
        if self.rank >= s:
            return G.float()
        state["steps"] = state.get("steps", -1) + 1
        state["R"] = project(G, drawn(s, self.rank, self.seed + state["steps"] // self.gap, G.device))  # until `after`
        return state["R"]

    def after(self, N: Tensor, G: Float[Tensor, "m n"], state: State) -> Float[Tensor, "m n"]:
        assert self.scale is not None
        if self.rank >= min(G.shape):
            return self.scale * N
        d = along(G)
        s = ratio(N, state.pop("R"), d if self.scaling == "channel" else None)
        length = (s.square() * squares(G, d)).sum().sqrt()
        return -self.scale * shortened(length, self.growth, state) * s * G.float()

    def matrix(self, m: int, n: int) -> int:
        return self.within.matrix(*proxy(m, n, self.rank))


@functools.lru_cache(maxsize=4)
def drawn(s: int, rank: int, seed: int, device: torch.device) -> Float[Tensor, "s r"]:
    """P, the other way round.

    >>> drawn(1000, 4, 0, torch.device("cpu")).std()
    tensor(0.4967)
    """
    return (torch.randn(s, rank, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)).to(device)
