"""SoRA (arXiv:2311.11696) and the sparsity of S2-LoRA (arXiv:2309.11756): the proximal map, zeros, schedules, and what is left of an export."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finebits as fb
from finebits.rules import _family as family
from papers.rules import linears, step, tensors, trained


def test_proximal_map() -> None:
    v = torch.tensor([-3.0, -1.5, -0.5, 0.5, 1.5, 3.0])
    assert family.soft(v, 1.0).tolist() == [-2.0, -0.5, 0.0, 0.0, 0.5, 2.0]  # and no dead zone up to 2


@pytest.mark.parametrize("rule", [fb.SoRA(threshold=0.6), fb.S2Sparsity(weight=0.6)], ids=lambda r: type(r).__name__)
def test_a_quadratic_loss_ends_at_the_soft_threshold_of_its_minimum(rule: fb.Rule) -> None:
    """argmin ½‖g − v‖² + λ‖g‖₁ = T_λ(v), with exact zeros."""
    model, v = linears(fb.Gated(rank=5, alpha=5.0)), torch.tensor([2.0, -1.0, 0.5, -0.4, 0.0])
    gate = tensors(model)["gate"]
    optimizer = torch.optim.SGD(trained(model), lr=0.2)
    for at in range(200):
        step(model, rule, lambda m: 0.5 * (gate - v).square().sum(), optimizer, at, total=200)
    torch.testing.assert_close(gate.detach(), torch.tensor([1.4, -0.4, 0.0, 0.0, 0.0]))
    assert (gate[2:] == 0).all()


def test_the_published_threshold_does_not_follow_the_rate() -> None:
    for scaled, wanted in ((True, 1.0 - 0.1 * 0.3), (False, 1.0 - 0.3)):
        model = linears(fb.Gated(rank=2, alpha=2.0))
        gate = tensors(model)["gate"]
        gate.data.fill_(1.0)
        step(model, fb.SoRA(threshold=0.3, scaled=scaled), lambda m: 0.0 * gate.sum(), torch.optim.SGD(trained(model), lr=0.1))
        torch.testing.assert_close(gate.detach(), torch.full((2,), wanted))


@pytest.mark.parametrize("schedule", ["linear", "log", "exp"])
def test_a_schedule_rises_from_nothing_to_the_threshold_in_stages(schedule: str) -> None:
    rule = fb.SoRA(threshold=7e-4, schedule=schedule, stages=7)
    prices = [rule.price(t, total=70) for t in range(1, 71)]
    assert prices[0] == 0 and prices[-1] == pytest.approx(7e-4) and prices == sorted(prices) and len(set(prices)) == 7
    middle = {"linear": 3.5e-4, "log": 4.34e-4, "exp": 2.64e-4}[schedule]
    assert prices[35] == pytest.approx(middle, rel=0.01)


def test_l1_in_the_loss_is_the_mean_of_all_gates() -> None:
    model = linears(fb.Gated(rank=3, alpha=3.0), ((7, 5), (4, 6)))
    gates = torch.cat([tensors(model, str(i))["gate"].detach() for i in (0, 1)])
    found = fb.SoRA(l1=10.0).penalty(fb.Run(model, dict(fb.hosts(model))))
    assert float(torch.as_tensor(found).detach()) == pytest.approx(10 * float(gates.abs().sum()) / 6)


def test_zeros_are_left_out_of_an_export_and_change_nothing() -> None:
    model, x, y = linears(fb.Gated(rank=6, alpha=6.0)), torch.randn(30, 5), torch.randn(30, 7)
    host, rule = model[0], fb.SoRA(threshold=0.5, scaled=False)
    step(model, rule, lambda m: (m[0](x) - y).square().mean(), torch.optim.SGD(trained(model), lr=1e-3))
    L, R = host.kinds["default"].lowrank(host.tensors("default"))
    left = int((host.p["default"]["gate"] != 0).sum())
    assert 0 < left < 6 and R.shape[0] == left
    torch.testing.assert_close(host(x), x @ (host.weight + L @ R).T, rtol=1e-5, atol=1e-5)


def test_gates_are_not_decayed_beside() -> None:
    model = linears(fb.Gated(rank=2, alpha=2.0))
    optimizer = torch.optim.AdamW(trained(model), lr=0.1, weight_decay=0.5)
    fb.factor(optimizer, [fb.SoRA()], fb.Run(model, dict(fb.hosts(model)), optimizer))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {k: decay[id(p)] for k, p in tensors(model).items()} == {"A": 0.5, "B": 0.5, "gate": 0.0}


def test_a_gate_that_is_zero_may_come_back() -> None:
    model = linears(fb.Gated(rank=2, alpha=2.0))
    gate = tensors(model)["gate"]
    gate.data.zero_()
    x, y = torch.randn(30, 5), 10 * torch.randn(30, 7)
    step(model, fb.SoRA(threshold=1e-3), lambda m: (m[0](x) - y).square().mean(), torch.optim.SGD(trained(model), lr=0.1))
    assert isinstance(model, nn.ModuleList) and (gate != 0).all()


def test_the_sparsity_of_s2_lora_is_of_every_matrix_and_its_factors_are_everyones() -> None:
    """Coefficients become zeros and are left out of an export; A and B stay one for both matrices."""
    model, x, y = linears(fb.S2LoRA(rank=6, alpha=6.0), ((7, 5), (7, 5))), torch.randn(30, 5), torch.randn(30, 7)
    optimizer, rule = torch.optim.AdamW(trained(model), lr=0.02), fb.S2Sparsity(weight=1.0)
    for at in range(30):
        step(model, rule, lambda m: (m[0](x) - y).square().mean() + m[1](x).square().mean(), optimizer, at, 30)
    one, other = tensors(model, "0"), tensors(model, "1")
    assert one["B"] is other["B"] and one["gate"] is not other["gate"] and not torch.equal(one["gate"], other["gate"])
    for name in ("0", "1"):
        host = model.get_submodule(name)
        left = int((tensors(model, name)["gate"] != 0).sum())
        L, R = host.kinds["default"].lowrank(host.tensors("default"))
        assert R.shape[0] == left < 6
        torch.testing.assert_close(host(x), x @ (host.weight + L @ R).T, rtol=1e-4, atol=1e-5)
