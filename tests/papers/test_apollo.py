"""APOLLO: as its algorithm says, Mini's one factor at rank 1, and factors that shrink with the square root of the rank (theorem 4.2)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from finebits.optim.apollo import APOLLO


def run(kind: APOLLO, W: Tensor, gradients: list[Tensor], lr: float = 0.1) -> Tensor:
    p = nn.Parameter(W.clone())
    optimizer = kind.make([{"params": [p], "weight_decay": 0.0}], lr=lr)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
    return p.detach()


def gradients(m: int, n: int, count: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(m, n, generator=gen) * (i + 1) for i in range(count)]


def algorithm(W: Tensor, Gs: list[Tensor], r: int, T: int, alpha: float, mini: bool, lr: float = 0.1) -> Tensor:
    """Algorithm 1 in float64 with γ = 1.01; P is the transpose of what is drawn. A tall weight is its transpose."""
    tall, W = W.shape[0] >= W.shape[1], W.double()
    M = V = torch.zeros(())
    last = 0.0
    for t, G in enumerate(Gs):
        G = G.double().T if tall else G.double()
        P = torch.randn(len(G), r, generator=torch.Generator().manual_seed(t // T)).T.double() / r**0.5
        R = P @ G
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = (M / (1 - 0.9 ** (t + 1))) / ((V / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        S = G * (N.norm() / R.norm() if mini else N.norm(dim=0) / R.norm(dim=0))
        if t and S.norm() > 1.01 * last:
            S = S / S.norm() * 1.01 * last
        last = float(S.norm())
        W = W - lr * alpha * (S.T if tall else S)
    return W


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_is_the_algorithm(shape: tuple[int, int]) -> None:
    W, Gs = torch.ones(shape), gradients(*shape, 7)
    assert torch.allclose(run(APOLLO(rank=3, gap=3, scale=0.5), W, Gs).double(), algorithm(W, Gs, 3, 3, 0.5, False), atol=1e-5)


def test_rank_one_is_mini() -> None:
    W, Gs = torch.ones(5, 7), gradients(5, 7, 7)
    mini = run(APOLLO(rank=1, gap=3), W, Gs)
    assert torch.allclose(mini.double(), algorithm(W, Gs, 1, 3, math.sqrt(128), True), atol=1e-5)
    assert not torch.allclose(mini, run(APOLLO(rank=1, gap=3, scaling="channel", scale=math.sqrt(128)), W, Gs), atol=1e-2)


def test_factors_shrink_with_the_root_of_the_rank() -> None:
    """Of Adam's first step, which has entries of 1: what α makes up for."""
    G = torch.randn(256, 300, generator=torch.Generator().manual_seed(2))
    far = [run(APOLLO(rank=r, growth=math.inf, scale=1.0), torch.zeros(256, 300), [G], 1.0).norm(dim=0) for r in (16, 64, 256)]
    for r, S in zip((16, 64), far, strict=False):
        assert (S / far[-1]).mean() == pytest.approx(math.sqrt(r / 256), rel=0.1)
