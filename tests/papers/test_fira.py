"""Fira: as its equations say, the inner optimizer where φ is 1, and a limit that the learning rate does not move."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from finebits.optim.fira import Fira


def run(kind: Fira, W: Tensor, gradients: list[Tensor], rates: list[float]) -> Tensor:
    p = nn.Parameter(W.clone())
    optimizer = kind.make([{"params": [p], "weight_decay": 0.0}], lr=1.0)
    for G, lr in zip(gradients, rates, strict=True):
        p.grad, optimizer.param_groups[0]["lr"] = G.clone(), lr
        optimizer.step()
    return p.detach()


def gradients(m: int, n: int, count: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(m, n, generator=gen) * (i + 1) for i in range(count)]


def equations(W: Tensor, Gs: list[Tensor], r: int, alpha: float, growth: float, rates: list[float]) -> Tensor:
    """In float64, P from the first gradient alone; a tall weight is its transpose."""
    tall, W = W.shape[0] >= W.shape[1], W.double()
    M = V = torch.zeros(())
    P, last = torch.zeros(()), 0.0
    for t, G in enumerate(Gs):
        G = G.double().T if tall else G.double()
        P = torch.linalg.svd(G).U[:, :r] if t == 0 else P
        R = P.T @ G
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = (M / (1 - 0.9 ** (t + 1))) / ((V / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        S = (G - P @ R) * (N.norm(dim=0) / R.norm(dim=0))
        if t and S.norm() > growth * last:
            S = S / S.norm() * growth * last
        last = float(S.norm())
        change = alpha * (P @ N + S)
        W = W - rates[t] * (change.T if tall else change)
    return W


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("growth", [1.01, math.inf])
def test_is_the_equations(shape: tuple[int, int], growth: float) -> None:
    """The rate goes up from 0, as it does in a warm-up: were it in the norms, S would stay where it began."""
    W, Gs, rates = torch.ones(shape), gradients(*shape, 5), [0.0, 0.1, 0.2, 0.3, 0.3]
    ours = run(Fira(rank=2, scale=0.5, growth=growth), W, Gs, rates)
    assert torch.allclose(ours.double(), equations(W, Gs, 2, 0.5, growth, rates), atol=1e-5)


def test_with_sgd_inside_it_is_sgd_at_any_rank() -> None:
    Gs = gradients(5, 7, 4)
    ours = run(Fira(rank=1, scale=1.0, growth=math.inf, inner="sgd"), torch.ones(5, 7), Gs, [0.01] * 4)
    assert torch.allclose(ours, 1 - 0.01 * sum(Gs), atol=1e-6)


def test_a_factor_of_growth_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="factor of growth a step, 1 or more; got 0.9"):
        Fira(growth=0.9)
