"""AdaLoRA (arXiv:2303.10512): the schedule, exact counts, and a planted problem that it must find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits.plan.base import Plan, Spec
from finebits.rules.base import Run
from golden.values import golden


def test_schedule() -> None:
    """Eq. 12 from 144 triplets to 96, t_i = 10, t_f = 20, T = 100."""
    rule = fb.AdaLoRA(warmup=10, final=20)
    assert [rule.budget(t, 100, 144, 96) for t in (0, 10, 11, 20, 45, 60, 79, 80, 100)] == [144, 144, 141, 126, 102, 97, 96, 96, 96]
    every = [rule.budget(t, 100, 144, 96) for t in range(101)]
    assert every == sorted(every, reverse=True)


def model(rank: int = 6) -> nn.Module:
    torch.manual_seed(2)
    two = nn.ModuleDict({"changed": nn.Linear(20, 16, bias=False), "same": nn.Linear(20, 16, bias=False)})
    spec = Spec(adapter=fb.Gated(rank=rank, alpha=float(rank)))
    return fb.build(two, Plan({"changed": spec, "same": spec}))


def planted() -> tuple[list[list[dict[str, Tensor]]], Any]:
    """A rank-3 change in one layer, none in the other."""
    gen = torch.Generator().manual_seed(4)
    start = model()
    delta = torch.randn(16, 3, generator=gen) @ torch.randn(3, 20, generator=gen) / 4
    W = {"changed": start["changed"].weight.detach() + delta, "same": start["same"].weight.detach()}
    steps = []
    for _ in range(120):
        x = torch.randn(32, 20, generator=gen)
        steps.append([{"x": x, **{k: x @ w.mT + 0.01 * torch.randn(32, 16, generator=gen) for k, w in W.items()}}])
    return steps, lambda m, b: sum((m[k](b["x"]) - b[k]).square().mean(-1).sum() for k in W)


def tune(rule: fb.AdaLoRA, on_step: Any = lambda run, loss: None) -> tuple[nn.Module, list[float]]:
    m, (steps, loss) = model(), planted()
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.03, weight_decay=0.0)
    count = lambda b: len(b["x"])  # noqa: E731
    return m, fb.train(m, steps, optimizer, total=len(steps), loss=loss, tokens=count, rules=[rule], on_step=on_step)


def opened(m: nn.Module) -> dict[str, int]:
    return {k: int((host.p["default"]["gate"] != 0).sum()) for k, host in fb.hosts(m)}


@pytest.fixture(scope="module")
def tuned() -> tuple[nn.Module, list[float], list[int]]:
    counts: list[int] = []
    m, losses = tune(fb.AdaLoRA(target_rank=2, warmup=10, final=30), lambda run, loss: counts.append(sum(opened(run.model).values())))
    return m, losses, counts


def test_exactly_the_budget_is_open_at_every_step(tuned: tuple[nn.Module, list[float], list[int]]) -> None:
    rule = fb.AdaLoRA(target_rank=2, warmup=10, final=30)
    expected = [rule.budget(t, 120, 12, 4) for t in range(1, 121)]
    assert tuned[2] == expected and tuned[2][-1] == 4


def test_ranks_go_where_the_change_is(tuned: tuple[nn.Module, list[float], list[int]]) -> None:
    m, losses, _ = tuned
    assert opened(m)["changed"] >= 3
    assert losses[-1] < 0.1 * losses[0]


def test_what_is_exported_has_the_open_gates_as_its_rank(tuned: tuple[nn.Module, list[float], list[int]]) -> None:
    host = tuned[0]["changed"]
    p = host.tensors("default")
    L, R = host.kinds["default"].lowrank(p)
    assert L.shape[1] == R.shape[0] == opened(tuned[0])["changed"]
    x = torch.randn(4, 20)
    torch.testing.assert_close(x @ (host.weight + L @ R).mT, host(x), rtol=1e-4, atol=1e-5)


def test_ties_keep_exactly_the_budget() -> None:
    """All scores are zero at a step whose gradients are zero: a threshold would close all or none."""
    m = model()
    rule = fb.AdaLoRA(target_rank=2)
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        for _, host in fb.hosts(m):
            host.p["default"]["gate"].fill_(1.0)
    rule.after_step(Run(m, dict(fb.hosts(m)), None, 100, 100))
    assert sum(opened(m).values()) == 4


def test_penalty_is_zero_for_orthonormal_factors_and_has_the_right_gradient() -> None:
    m = model(4)
    run, rule = Run(m, dict(fb.hosts(m))), fb.AdaLoRA(orthogonal=0.5)
    with torch.no_grad():
        for _, host in fb.hosts(m):
            p = host.p["default"]
            p["A"].copy_(torch.linalg.qr(torch.randn(20, 4)).Q.mT)
            p["B"].copy_(torch.linalg.qr(torch.randn(16, 4)).Q)
    assert rule.penalty(run).item() < 1e-5
    with torch.no_grad():
        for _, host in fb.hosts(m):
            host.p["default"]["A"].mul_(2.0)
    value = rule.penalty(run)  # ‖4 I − I‖ = 3·√4 = 6 for the two A, 0 for the two B
    assert value.item() == pytest.approx(0.5 * 12 / 4, rel=1e-4)
    value.backward()
    A = m["changed"].p["default"]["A"]
    torch.testing.assert_close(A.grad, 0.5 / 4 * 2 * (A @ A.mT - torch.eye(4)) @ A / 6 * 1.0, rtol=1e-3, atol=1e-5)


def test_no_gates_is_an_error_that_says_what_to_plan() -> None:
    plain = fb.build(nn.Sequential(nn.Linear(8, 8)), Plan({"0": Spec(adapter=fb.LoRA(rank=2))}))
    with pytest.raises(ValueError, match="gated"):
        fb.AdaLoRA().penalty(Run(plain, dict(fb.hosts(plain))))


def test_the_authors_gates_scores_update_and_penalty() -> None:
    """Twelve steps whose gradients are given. Their last cut, after step 9, goes by the scores of step 8."""
    theirs, spec = golden("adalora"), Spec(adapter=fb.Gated(rank=4, alpha=6.0))
    layers = nn.ModuleDict({"0": nn.Linear(9, 6), "1": nn.Linear(5, 7)})
    m = fb.build(layers, Plan({"0": spec, "1": spec}, levers=fb.Levers(dtype="float32")))
    hosts = dict(fb.hosts(m))
    rule = fb.AdaLoRA(target_rank=2, warmup=2, final=3, beta1=0.8, beta2=0.7, orthogonal=0.5)
    weights = {f"{name}.{k}": w for name, host in hosts.items() for k, w in host.p["default"].items()}
    with torch.no_grad():
        for name, w in weights.items():
            w.copy_(theirs[name].view(w.shape))
        for name, host in hosts.items():
            update = spec.adapter.merged(dict(host.p["default"].items()), torch.zeros(host.weight.shape))
            torch.testing.assert_close(update, theirs[f"{name}.update"], rtol=1e-5, atol=1e-5)
    assert rule.penalty(Run(m, hosts)).item() == pytest.approx(float(theirs["penalty"]), rel=1e-5)
    for step in range(1, 9):
        with torch.no_grad():
            for name, w in weights.items():
                w.grad = theirs[f"{name}.grads"][step - 1].view(w.shape)
                w.sub_(0.3 * w.grad)
        rule.after_step(Run(m, hosts, None, step, 12))
        opened = torch.cat([(host.p["default"]["gate"].detach() != 0).float() for host in hosts.values()])
        assert torch.equal(opened, theirs["opened"][step - 1])
    for name, host in hosts.items():
        scores = rule.scores(f"{name}.default", dict(host.p["default"].items()))
        torch.testing.assert_close(scores, theirs[f"{name}.scores"][0], rtol=1e-4, atol=1e-6)
