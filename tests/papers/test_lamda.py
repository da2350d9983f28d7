"""LaMDA: columns of B follow A into the ice, the largest singular values first, and stay to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits.plan.base import Plan, Spec
from finebits.rules.base import Run

RANK, STEPS = 5, 20


def model() -> nn.Module:
    torch.manual_seed(1)
    spec = Spec(adapter=fb.SLoRA(rank=RANK, alpha=8.0, train="left"), init=fb.LaMDA())
    return fb.build(
        nn.Sequential(nn.Linear(18, 14), nn.Tanh(), nn.Linear(14, 22)), Plan({"0": spec, "2": spec}, levers=fb.Levers(dtype="float32"))
    )


def trace(eta: float) -> tuple[list[dict[str, Tensor]], list[int]]:
    """The factors B after every step, and how many tensors the optimizer holds a state of."""
    m, gen = model(), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    steps = [[{"x": torch.randn(8, 18, generator=gen), "y": torch.randn(8, 22, generator=gen)}] for _ in range(STEPS)]
    seen: list[dict[str, Tensor]] = [{n: h.p["default"]["B"].detach().clone() for n, h in fb.hosts(m)}]
    states: list[int] = []

    def look(run: Run, loss: float) -> None:
        seen.append({n: h.p["default"]["B"].detach().clone() for n, h in run.hosts.items()})
        states.append(len(optimizer.state))

    square: Any = lambda m, b: (m(b["x"]) - b["y"]).square().sum()  # noqa: E731
    fb.train(m, steps, optimizer, total=STEPS, loss=square, tokens=lambda b: 8, rules=[fb.LaMDAFreeze(eta=eta)], on_step=look)
    return seen, states


def test_the_columns_are_in_the_order_of_the_singular_values() -> None:
    for _, host in fb.hosts(model()):
        N = host.p["default"]["N"].detach()
        assert torch.equal(N, N.diagonal().diag()) and (N.diagonal().diff() <= 0).all()


def test_the_first_columns_are_frozen_to_the_bit_under_momentum_and_decay() -> None:
    seen, states = trace(0.5)  # t_f = 10: two steps a column
    for t in range(STEPS):
        k = min(RANK, RANK * t // 10)
        for now, after in zip(seen[t].values(), seen[t + 1].values(), strict=True):
            assert torch.equal(now[:, :k], after[:, :k])
            assert (now[:, k:] != after[:, k:]).any(0).all(), "what is not frozen moves"
    assert states == [4] * 10 + [2] * 10  # B and N of two layers, then N alone


def test_a_run_shorter_than_its_rank_freezes_several_at_once() -> None:
    rule = fb.LaMDAFreeze(eta=0.3)
    assert [rule.columns(t, 100, 64) for t in (0, 1, 15, 29, 30, 100)] == [0, 2, 32, 61, 64, 64]
    assert [rule.columns(t, 2, 4) for t in range(3)] == [0, 4, 4]


def test_what_it_cannot_do_without() -> None:
    with pytest.raises(ValueError, match="eta above 0"):
        fb.LaMDAFreeze(eta=0.0)
    plain = fb.build(nn.Sequential(nn.Linear(8, 8)), Plan({"0": Spec(adapter=fb.LoRAXS(rank=2))}))
    with pytest.raises(ValueError, match="take adapter slora"):
        fb.LaMDAFreeze().after_backward(Run(plain, dict(fb.hosts(plain)), None, 1, 2))
