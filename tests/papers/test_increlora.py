"""IncreLoRA (arXiv:2308.12043): growth that changes nothing at once, an exact budget, old moments, own warmup, and a planted problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
from papers.rules import linears, step, tensors, trained

SIZES = ((16, 20), (16, 20), (12, 20))


def grown(rule: Any, steps: int, look: Any = lambda t, model: None, adapter: Any = None, planted: int = 0) -> nn.Module:
    """Three linears, of which one has a change of rank 3 to learn."""
    torch.manual_seed(1)
    model = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in SIZES)
    fb.build(model, fb.Plan({str(i): fb.Spec(adapter=adapter or fb.Gated(rank=6, alpha=6.0)) for i in range(3)}))
    W = [linear.weight.detach().clone() for linear in model]
    W[planted] += torch.randn(SIZES[planted][0], 3) @ torch.randn(3, 20) / 4
    optimizer = torch.optim.AdamW(trained(model), lr=0.02, weight_decay=0.1)
    for t in range(steps):
        x = torch.randn(32, 20)
        step(model, rule, lambda m, x=x: sum((m[i](x) - x @ W[i].T).square().mean() for i in range(3)), optimizer, t, steps)
        look(t + 1, model)
    return model


def ranks(rule: Any) -> list[int]:
    return [int((rule.opened[f"{i}.default"] < 1 << 62).sum()) for i in range(3)]


def test_the_budget_is_reached_exactly_and_kept() -> None:
    """7 directions are missing, and 4 at a time: 4, then 3, then none."""
    rule, seen = fb.IncreLoRA(target_rank=4, start=1, warmup=10, every=5, top=4), []
    sizes = lambda t, model: seen.append(sum(ranks(rule)))  # noqa: E731
    grown(rule, 40, sizes)
    assert [seen[t - 1] for t in (1, 9, 10, 14, 15, 20, 25, 40)] == [
        3,
        3,
        6,
        6,
        9,
        12,
        12,
        12,
    ]  # three matrices, four at most to each event
    narrow = fb.IncreLoRA(target_rank=3, start=1, warmup=4, every=4, top=2)
    grown(narrow, 24)
    assert sum(ranks(narrow)) == 9
    full = fb.IncreLoRA(target_rank=9, start=1, warmup=1, every=1, top=9)
    grown(full, 12, adapter=fb.Gated(rank=4, alpha=4.0))
    assert ranks(full) == [4, 4, 4], "no matrix gets more than its adapter holds"


@pytest.mark.parametrize("planted", [0, 2])
def test_the_matrix_that_has_something_to_learn_grows(planted: int) -> None:
    rule = fb.IncreLoRA(target_rank=2, start=1, warmup=15, every=5, top=1)
    grown(rule, 60, planted=planted)
    found = ranks(rule)
    assert sum(found) == 6 and found[planted] == 4


def test_growth_changes_the_function_by_nothing_that_is_seen() -> None:
    rule, x = fb.IncreLoRA(target_rank=4, warmup=5, every=5, top=3), torch.randn(9, 20)
    model = linears(fb.Gated(rank=5, alpha=5.0), SIZES)
    for name in ("0", "1", "2"):
        tensors(model, name)["gate"].data.zero_()
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    step(model, rule, lambda m: sum(m[i](x).square().mean() for i in range(3)), optimizer, 0)
    before = [m(x).detach() for m in model]
    for t in range(1, 6):
        step(model, rule, lambda m: sum(m[i](x).square().mean() for i in range(3)), optimizer, t)
    assert ranks(rule) == [2, 2, 2]
    for m, y in zip(model, before, strict=True):
        assert float((m(x) - y).detach().abs().max()) < 1e-3 and not torch.equal(m(x), y)  # a reserve of 1e-5 times B and A of size one


def test_what_does_not_learn_yet_is_what_it_was_to_the_bit_and_old_moments_are_left_alone() -> None:
    rule = fb.IncreLoRA(target_rank=3, start=1, warmup=6, every=50, top=3, ramp=4)
    seen: list[dict[str, torch.Tensor]] = []
    grown(rule, 12, lambda t, model: seen.append({k: v.detach().clone() for k, v in tensors(model).items()}))
    first, grow = seen[0], seen[5]
    for now in seen[:5]:
        assert torch.equal(now["B"][:, 2:], first["B"][:, 2:]) and torch.equal(now["A"][2:], first["A"][2:]), "not even decayed"
        assert float(now["gate"][1]) == pytest.approx(1e-5) and (now["gate"][2:] == 0).all()
    assert not torch.equal(grow["A"][1], first["A"][1]), "the reserve learns in advance"
    steps = [float((b["A"][2] - a["A"][2]).norm()) for a, b in zip(seen[5:], seen[6:], strict=False)]
    assert 0 < steps[0] < 0.5 * steps[3], "the new reserve starts slowly"
    assert float(grow["gate"][2]) == pytest.approx(1e-5) and float(grow["gate"][1]) == pytest.approx(1e-5)
    assert abs(float(seen[8]["gate"][1])) > 1e-4, "and what was opened goes on"


def test_orthogonality_is_of_what_learns() -> None:
    model, rule = linears(fb.Gated(rank=4, alpha=4.0), ((6, 8),)), fb.IncreLoRA(start=2, orthogonal=0.5)
    p, run = tensors(model), fb.Run(model, dict(fb.hosts(model)))
    rule.before_forward(run)
    A, B = p["A"].detach()[:3], p["B"].detach()[:, :3]  # two that are open and one in reserve
    wanted = 0.5 * ((A @ A.T - torch.eye(3)).norm() + (B.T @ B - torch.eye(3)).norm()) / 2
    assert float(torch.as_tensor(rule.penalty(run)).detach()) == pytest.approx(float(wanted), rel=1e-5)
