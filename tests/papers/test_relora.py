"""ReLoRA (arXiv:2307.05695): a new start changes nothing at once, ranks add up, moments are pruned, and the rate rises anew."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import finebits as fb
from papers.rules import step, tensors, trained

X, Y = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)), torch.randn(40, 10, generator=torch.Generator().manual_seed(2))


def model(adapter: object, format: object = None) -> nn.Module:
    torch.manual_seed(0)
    return fb.build(nn.ModuleList([nn.Linear(12, 10, bias=False)]), fb.Plan({"0": fb.Spec(format=format, adapter=adapter)}))  # type: ignore[arg-type]


def squared(m: nn.Module) -> torch.Tensor:
    return (m[0](X) - Y).square().mean()


def test_ranks_add_up_on_a_base_of_four_bits() -> None:
    """Three updates of rank 2 are one of rank 6, and fit better than one of rank 2 does."""
    left = {}
    for adapter, rules in ((fb.LoRA(2, 2.0), []), (fb.Restarted(2, 2.0, slots=2), [fb.ReLoRA(warmup=5)])):
        m = model(adapter, fb.NF(4, block=16))
        codes = {k: v.clone() for k, v in m.state_dict().items() if ".p." not in k}
        optimizer = torch.optim.AdamW(trained(m), lr=0.03, weight_decay=0.0)
        rule = rules[0] if rules else fb.Rule()
        for t in range(240):
            step(m, rule, squared, optimizer, t, 240)
        left[len(rules)] = float(squared(m).detach())
        rank = int(torch.linalg.matrix_rank(torch.matmul(*m[0].kinds["default"].lowrank(m[0].tensors("default"))), rtol=1e-4))
        assert rank == (6 if rules else 2)
        assert all(torch.equal(codes[k], v) for k, v in m.state_dict().items() if k in codes), "the codes are never touched"
    assert left[1] < 0.8 * left[0]


def test_a_new_start_changes_nothing_at_once_and_forgets_most_of_the_moments() -> None:
    m, rule = model(fb.Restarted(2, 3.0, slots=2)), fb.ReLoRA(every=4, prune=0.9, warmup=0)
    optimizer = torch.optim.AdamW(trained(m), lr=0.03)
    for t in range(3):
        step(m, rule, squared, optimizer, t, 12)
    p, before = tensors(m), {}
    run = fb.Run(m, dict(fb.hosts(m)), optimizer, 3, 12)
    rule.before_forward(run)
    squared(m).backward()
    rule.after_backward(run)
    optimizer.step()
    before |= {k: v.detach().clone() for k, v in p.items()} | {"out": m[0](X).detach()}
    moments = {k: optimizer.state[p[k]]["exp_avg"].clone() for k in ("A", "B")}
    run.step = 4
    rule.after_step(run)
    torch.testing.assert_close(m[0](X).detach(), before["out"], rtol=1e-5, atol=1e-5)
    assert torch.equal(p["A0"][:2], before["A"]) and torch.equal(p["B0"][:, :2], before["B"]) and (p["A0"][2:] == 0).all()
    assert (p["B"] == 0).all() and not torch.equal(p["A"], before["A"]) and float(p["A"].detach().abs().max()) <= 1 / math.sqrt(12)
    for k, old in moments.items():
        now, keep = optimizer.state[p[k]]["exp_avg"], round(0.1 * old.numel())
        assert int((now != 0).sum()) == keep and torch.equal(now[now != 0].abs().sort().values, old.abs().flatten().sort().values[-keep:])


def test_the_rate_rises_from_nothing_after_every_start_and_the_schedule_does_not_notice() -> None:
    m, rule, seen = model(fb.Restarted(2, 2.0, slots=1)), fb.ReLoRA(every=4, warmup=3), []

    class Seeing(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            seen.append(self.param_groups[0]["lr"])
            super().step()

    optimizer = Seeing(trained(m), lr=0.4)
    for t in range(8):
        step(m, rule, squared, optimizer, t, 8)
        assert optimizer.param_groups[0]["lr"] == 0.4
    assert seen == pytest.approx([0.4] * 4 + [0.1, 0.2, 0.3, 0.4])


def test_its_export_is_one_lora_and_a_run_must_fit_its_room() -> None:
    adapter = fb.Restarted(rank=2, alpha=4.0, slots=3)
    m = model(adapter)
    L, R = adapter.lowrank(m[0].tensors("default"))
    assert (L.shape, R.shape) == ((10, 8), (8, 12))
    assert fb.ReLoRA().length(slots=3, total=103) == 26 and fb.ReLoRA(every=30).length(slots=3, total=120) == 30
    with pytest.raises(ValueError, match="set its slots to 4"):
        step(m, fb.ReLoRA(every=30), squared, torch.optim.SGD(trained(m), lr=0.1), 0, total=121)
