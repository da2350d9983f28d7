"""Several low-rank updates of one matrix into one: what a way of merging is given, and the arithmetic of products that are never formed.

Weights stand before updates: Σ wᵢ·sᵢ·Bᵢ Aᵢ is what is meant. Ways that work on the factors alone (linear, ties, dare) take √|wᵢsᵢ| into each of
both, the sign into A, and give another update than that sum, since (Σ Bᵢ)(Σ Aᵢ) has products across adapters too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.errors import Invalid


class Factors(NamedTuple):
    """The update s·B A of an (m, n) matrix.

    >>> Factors(torch.ones(3, 1), torch.ones(1, 2), 2.0).rank
    1
    """

    B: Float[Tensor, "m r"]
    A: Float[Tensor, "r n"]
    s: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]


class Merging(Protocol):
    """A way of merging: a frozen dataclass, whose random numbers are `gen`'s."""

    def __call__(self, each: Sequence[Factors], weights: Sequence[float], gen: Generator) -> Factors: ...


def inner(a: Factors, b: Factors) -> float:
    """⟨ΔWₐ, ΔW_b⟩ = sₐ s_b tr((Bₐᵀ B_b)(A_b Aₐᵀ)), of r × r matrices.

    >>> a = Factors(torch.ones(3, 1), torch.ones(1, 2), 2.0)  # twos everywhere
    >>> inner(a, a)
    24.0
    """
    BB, AA = a.B.double().mT @ b.B.double(), b.A.double() @ a.A.double().mT
    return a.s * b.s * float((BB * AA.mT).sum())


def norm(a: Factors) -> float:
    """‖s·B A‖.

    >>> norm(Factors(torch.ones(3, 1), torch.ones(1, 3), 2.0))
    6.0
    """
    return math.sqrt(max(inner(a, a), 0.0))


def joined(each: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ wᵢ·sᵢ·Bᵢ Aᵢ exactly: the factors side by side, ranks add.

    >>> one = Factors(torch.ones(3, 1), torch.ones(1, 2), 2.0)
    >>> sum_ = joined([one, one], [1.0, 0.5])
    >>> sum_.rank, sum_.B @ sum_.A
    (2, tensor([[3., 3.],
            [3., 3.],
            [3., 3.]]))
    """
    return Factors(torch.cat([f.B for f in each], 1), torch.cat([w * f.s * f.A for f, w in zip(each, weights, strict=True)]))


def entrywise(
    each: Sequence[Factors], weights: Sequence[float], merge: Callable[[Float[Tensor, "k ..."], Float[Tensor, " k"]], Tensor]
) -> Factors:
    """A way of merging tensors that have one shape, over A and then over B. Raises ValueError where ranks differ.

    >>> one = Factors(torch.ones(3, 1), torch.ones(1, 2), 2.0)
    >>> entrywise([one, one], [0.5, 0.5], lambda t, w: torch.einsum("k...,k->...", t, w)).A  # √(½ · 2) of each
    tensor([[2., 2.]])
    """
    if len(ranks := sorted({f.rank for f in each})) > 1:
        raise Invalid(f"ranks are {' and '.join(map(str, ranks))}, and factors are added entry by entry: merge by cat or svd")
    scales = [w * f.s for f, w in zip(each, weights, strict=True)]
    roots = torch.tensor([math.sqrt(abs(v)) for v in scales])
    signed = torch.tensor([math.copysign(math.sqrt(abs(v)), v) for v in scales])
    A = merge(torch.stack([f.A for f in each]), signed)
    return Factors(merge(torch.stack([f.B for f in each]), roots), A)


def elected(tau: Float[Tensor, "k ..."], weights: Float[Tensor, " k"]) -> Float[Tensor, ...]:
    """Entry by entry the weighted mean of those that have the sign of the sum, + where that is 0: TIES, Alg. 1, its last two steps.

    >>> elected(torch.tensor([[3.0, -2.0], [1.0, 4.0]]), torch.ones(2))
    tensor([2., 4.])
    """
    gamma = torch.where(tau.sum(0) >= 0, 1.0, -1.0)
    agrees = tau.sign() == gamma
    return torch.einsum("k...,k->...", tau * agrees, weights) / agrees.sum(0).clamp(min=1)


def dropped(tau: Float[Tensor, "k ..."], density: float, gen: Generator) -> Float[Tensor, "k ..."]:
    """A random share of the entries, rescaled so that their mean stays: DARE, eq. 1.

    >>> dropped(torch.ones(1, 4), 0.5, torch.Generator().manual_seed(0)).unique()
    tensor([0., 2.])
    """
    kept = torch.stack([torch.bernoulli(torch.full_like(t, density), generator=gen) for t in tau])
    return tau * kept / density


def check_density(density: float) -> None:
    """Raise ValueError where a share of entries is none.

    >>> check_density(1.5)
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: density is 1.5; it is the share of entries that stay, above 0 and at most 1
    """
    if not 0 < density <= 1:
        raise Invalid(f"density is {density}; it is the share of entries that stay, above 0 and at most 1")
