"""LoRA-XS and its start LoRA-SB: frozen orthonormal factors, the projection of the gradient, the first step approximated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finebits as fb
from finebits.adapters.base import Base
from finebits.init.lora_sb import LoRASB
from finebits.plan.base import Plan, Spec
from finebits.stats.grad import Grad
from papers.gram import seen


def test_the_gradient_of_the_core_is_the_projection_of_the_weights() -> None:
    W, X, G, adapter = torch.randn(19, 43), torch.randn(30, 43), torch.randn(30, 19), fb.LoRAXS(rank=5, alpha=5.0)
    p = adapter.params(Base(W), torch.Generator(), {})
    p["R"].requires_grad_()
    adapter.forward(p, X, Base(W)).backward(G)
    grad = G.mT @ X
    torch.testing.assert_close(p["R"].grad, p["B"].mT @ grad @ p["A"].mT, rtol=1e-4, atol=1e-4)
    nearest = torch.linalg.lstsq(torch.kron(p["B"], p["A"].mT.contiguous()), grad.flatten()[:, None]).solution.view(5, 5)
    torch.testing.assert_close(p["R"].grad, nearest, rtol=1e-3, atol=1e-3)


def test_factors_are_the_top_vectors_and_never_move() -> None:
    model = nn.Sequential(nn.Linear(43, 19))
    W = model[0].weight.detach().clone()
    host = fb.build(model, Plan({"0": Spec(adapter=fb.LoRAXS(rank=5, alpha=5.0))}))[0]
    p = host.p["default"]
    U, _, Vh = torch.linalg.svd(W)
    torch.testing.assert_close((U[:, :5].mT @ p["B"]).abs(), torch.eye(5), rtol=0, atol=1e-4)
    torch.testing.assert_close((Vh[:5] @ p["A"].mT).abs(), torch.eye(5), rtol=0, atol=1e-4)
    assert sum(q.numel() for q in host.parameters() if q.requires_grad) == 25


@pytest.mark.parametrize("alpha", [3.0, 12.0])
def test_sb_starts_at_the_best_approximation_of_the_first_step(alpha: float) -> None:
    X, D = torch.randn(50, 43), torch.randn(50, 19)
    W, stats, adapter = torch.randn(19, 43), seen(X, D, Grad), fb.LoRAXS(rank=6, alpha=alpha)
    base, start = LoRASB(lr=1e-3)(W, adapter, lambda V: V, stats)
    U, S, Vh = torch.linalg.svd(-1e-3 * stats[Grad].value().sign())
    p = adapter.params(Base(base), torch.Generator(), start)
    assert torch.equal(base, W)
    torch.testing.assert_close(adapter.merged(p, base) - W, U[:, :6] * S[:6] @ Vh[:6], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(p["B"].mT @ p["B"], torch.eye(6), rtol=0, atol=1e-5)


def test_sb_lowers_the_loss_of_the_calibration_batch() -> None:
    fell = 0
    for seed in range(30):
        gen = torch.Generator().manual_seed(seed)
        W, X, Y = (torch.randn(*s, generator=gen) for s in ((19, 23), (60, 23), (60, 19)))
        loss = lambda V: float((F.linear(X, V) - Y).square().sum())  # noqa: B023, E731
        adapter = fb.LoRAXS(rank=4, alpha=4.0)
        base, start = LoRASB(lr=1e-3)(W, adapter, lambda V: V, seen(X, 2 * (F.linear(X, W) - Y), Grad))
        fell += loss(adapter.merged(start, base)) < loss(W)
    assert fell == 30


def test_an_adapter_without_a_core_cannot_take_it() -> None:
    base, start = LoRASB()(torch.randn(9, 12), fb.LoRA(rank=2), lambda V: V, seen(torch.randn(5, 12), torch.randn(5, 9), Grad))
    with pytest.raises(ValueError, match="no parameter 'R'"):
        fb.LoRA(rank=2).params(Base(base), torch.Generator(), start)
