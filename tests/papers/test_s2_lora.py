"""S2-LoRA (arXiv:2309.11756): factors that layers share, coefficients that are their own. How sharing works is in tests/laws/test_shared.py."""

from __future__ import annotations

import torch
from torch import nn

import finebits as fb
from finebits.adapters.base import Base
from finebits.build import hosts
from finebits.plan.base import Plan, Spec


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 6), nn.Linear(6, 16), nn.Linear(16, 6))
    return fb.build(layers, Plan({str(i): Spec(adapter=fb.S2LoRA(rank=4)) for i in range(6)}))


def test_a_group_of_equal_shapes_has_one_pair_of_factors() -> None:
    """r(m + n) for each of the shapes 16x16, 6x16 and 16x6, and r for each of six layers."""
    trained = [p for p in model().parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 4 * (32 + 22 + 22) + 6 * 4


def test_layers_differ_in_their_coefficients_alone() -> None:
    one = model()
    with torch.no_grad():
        for i, (_, host) in enumerate(hosts(one)):
            host.p["default"]["gate"].copy_(torch.tensor([1.0, 0.0, -0.5, 0.0]) * (i + 1))
    first, second = (host.stack().weight - host.weight for _, host in list(hosts(one))[:2])
    torch.testing.assert_close(second, 2 * first)
    assert torch.linalg.matrix_rank(first) == 2


def test_export_leaves_out_what_is_zero() -> None:
    adapter, W, x = fb.S2LoRA(rank=5, alpha=10.0), torch.randn(7, 11), torch.randn(4, 11)
    p = {"A": torch.randn(5, 11), "B": torch.randn(7, 5), "gate": torch.tensor([0.0, 1.5, 0.0, 0.0, -2.0])}
    L, R = adapter.lowrank(p)
    assert L.shape == (7, 2) and R.shape == (2, 11)
    torch.testing.assert_close(adapter.forward(p, x, Base(W)), x @ (W + L @ R).mT, rtol=1e-4, atol=1e-5)
