"""RandLoRA: Full-rank Parameter-efficient Fine-tuning of Large Models.  Albert et al., ICLR 2025.  arXiv:2502.00987v2.
Use it when low rank is what limits and there is time: an update of full rank with about as many trained numbers as LoRA has.

    W′ = W + s·Σ_j B_j Λ_j A Γ_j,    B_j ∈ ℝ^{m×r},  A ∈ ℝ^{r×n} random and frozen,    j = 1 … N = ⌈n/r⌉,    s = α/r

Λ_j (r) and Γ_j (n) are trained diagonals. So for m ≥ n; a wide weight has the transpose of it, so that the diagonals are those of the shorter
side k. At birth Λ = 0 and Γ = 1/max(N, k). Bases are uniform, or ternary: nonzero with probability 1/3 ("sparse") or 1/√k ("very_sparse"); their
deviation is 1. The smaller r, the more bases and trained numbers: N(r + k).
Deviations: weights of one shape have bases of their own, where the authors take corners of one set for the model. They are stored, not only
drawn from the seed: then those that others drew can be loaded. B is [B_1 … B_N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters.base import Layer, Params, check_scale, complete
from finebits.dispatch import plain
from finebits.errors import Invalid
from finebits.qtensor import dense


@dataclass(frozen=True)
class RandLoRA(Usual):
    """Trained diagonals in a sum of random products; `basis` is r, the rank of each.

    >>> p = {"A": torch.ones(1, 2), "B": torch.eye(2), "lam": torch.tensor([[1.0, 2.0]]), "gamma": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    >>> fb.RandLoRA(basis=1, alpha=1).merged(p, torch.zeros(2, 2))  # of rank 2
    tensor([[1., 0.], [0., 2.]])
    >>> fb.RandLoRA(basis=32).size(3072, 3072), fb.RandLoRA(basis=16).size(3072, 3072)  # the knob turns the other way
    (297984, 592896)
    """

    basis: int = 32
    alpha: float = 640.0
    bases: Literal["dense", "sparse", "very_sparse"] = "dense"
    rank: ClassVar[int] = 0
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    shared: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def __post_init__(self) -> None:
        if self.basis < 1:
            raise Invalid(f"basis is {self.basis}; it must be at least 1")
        check_scale(self.basis, self.alpha)
        if self.bases not in ("dense", "sparse", "very_sparse"):
            raise Invalid(f"bases is {self.bases!r}; it can be 'dense', 'sparse' or 'very_sparse'")

    @property
    def s(self) -> float:
        """The factor in front of the sum.

        >>> fb.RandLoRA().s
        20.0
        """
        return self.alpha / self.basis

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        shapes = self.shapes(*base.weight.shape)
        N, k = shapes["gamma"]
        own = {"lam": torch.zeros(shapes["lam"]), "gamma": torch.full((N, k), 1 / max(N, k))}
        for name in ("A", "B"):
            own[name] = torch.empty(shapes[name]) if name in start else self._drawn(shapes[name], k, gen)
        return complete(own, start, "RandLoRA")

    def _drawn(self, shape: tuple[int, ...], k: int, gen: Generator) -> Tensor:
        U = torch.rand(shape, generator=gen) * 2 - 1
        if self.bases == "dense":
            return U * math.sqrt(3.0)
        some = 1 / 3 if self.bases == "sparse" else 1 / math.sqrt(k)
        return U.sign() * (U.abs() < some) / math.sqrt(some)

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        z, B, tall = base.drop(x), p["B"], x.shape[-1] == p["gamma"].shape[1]
        update = F.linear(_times(z, p, True), B) if tall else _times(F.linear(z, B.mT), p, False)
        return base(x) + self.s * update

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        update = p["B"] @ _stacked(p["A"], p["lam"], p["gamma"])
        return dense(W) + self.s * (update if W.shape[0] >= W.shape[1] else update.mT)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        r, k = self.basis, min(m, n)
        N = -(-k // r)
        return {"A": (r, k), "B": (max(m, n), N * r), "lam": (r, N), "gamma": (N, k)}


def _stacked(A: Tensor, lam: Tensor, gamma: Tensor) -> Float[Tensor, "Nr k"]:
    """Q = [Λ_1 A Γ_1; …; Λ_N A Γ_N]."""
    return (lam.mT[:, :, None] * A * gamma[:, None]).flatten(0, 1)


def _times(v: Tensor, p: Params, across: bool) -> Tensor:
    """v Qᵀ where v goes across the columns of Q, else v Q."""
    A, lam, gamma = p["A"], p["lam"], p["gamma"]
    if plain(v):
        return Bases.apply(v, A, lam, gamma, across)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    Q = _stacked(A, lam, gamma)
    return F.linear(v, Q if across else Q.mT)


class Bases(torch.autograd.Function):
    """v Qᵀ or v Q with one Λ_j A Γ_j there at a time, forward and backward: nothing is kept but v."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, A: Tensor, lam: Tensor, gamma: Tensor, across: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(v, A, lam, gamma)
        ctx.across = across
        return _by_turns(v, A, lam, gamma, across)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        v, A, lam, gamma = ctx.saved_tensors
        g = grads[0]
        dv = _by_turns(g, A, lam, gamma, not ctx.across) if ctx.needs_input_grad[0] else None
        long, short = (v, g) if ctx.across else (g, v)
        long, short = long.reshape(-1, long.shape[-1]), short.reshape(-1, *lam.mT.shape)
        dlam, dgamma = torch.empty_like(lam), torch.empty_like(gamma)
        for j in range(len(gamma)):
            dQ = A * (short[:, j].mT @ long)  # of Λ_j A Γ_j, as far as both have it
            dlam[:, j], dgamma[j] = dQ @ gamma[j], lam[:, j] @ dQ
        return dv, None, dlam, dgamma, None


def _by_turns(v: Tensor, A: Tensor, lam: Tensor, gamma: Tensor, across: bool) -> Tensor:
    bases = (lam[:, j, None] * A * gamma[j] for j in range(len(gamma)))
    if across:
        return torch.cat([v @ base.mT for base in bases], -1)
    out = v.new_zeros(*v.shape[:-1], A.shape[-1], dtype=torch.promote_types(v.dtype, torch.float32))  # N sums would each be rounded
    for part, base in zip(torch.split(v, len(A), -1), bases, strict=True):
        out += part @ base
    return out.to(v.dtype)
