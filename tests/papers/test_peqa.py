"""PEQA: scales alone are trained, so that a model in integers stays one; what they can learn, and what they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits.adapters.base import Base

M, N = 24, 96


def base(block: int | str = 32, bits: int = 3, symmetric: bool = True, variant: str | None = None) -> Any:
    return fb.quantize(torch.randn(M, N, generator=torch.Generator().manual_seed(0)), fb.Int(bits, block, symmetric, variant=variant))


@pytest.mark.parametrize("block", ["row", 32])
@pytest.mark.parametrize(("symmetric", "variant"), [(True, None), (True, "full"), (False, None), (False, "integer")])
def test_the_gradient_of_scales_is_that_of_autograd_without_one_of_weights(block: Any, symmetric: bool, variant: str | None) -> None:
    q, gen = base(block, 4, symmetric, variant), torch.Generator().manual_seed(1)
    X, G, delta = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((10, N), (10, M), (M, 1 if block == "row" else 3)))
    ours, theirs, sizes = (0.1 * delta).requires_grad_(), (0.1 * delta).requires_grad_(), set[tuple[int, ...]]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.add(tuple(t.shape)), t)[1], lambda t: t):
        fb.PEQA(block).forward({"delta": ours}, X, Base(q)).backward(G)
    assert (M, N) not in sizes
    low = q.parts["shift"].double() if "shift" in q.parts else torch.zeros(M, 1)
    low = q.format.spread(low, N)
    unit = (q.dequantize().double() - low) / q.format.spread(q.parts["scale"].double(), N)
    W = unit * q.format.spread(q.parts["scale"] * theirs.exp(), N) + low
    (X @ W.mT).backward(G)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6 * float(theirs.grad.abs().max()))  # type: ignore[union-attr]


def fitted(target: Tensor, q: Any) -> tuple[float, float]:
    """The mean square at the start, and with the best scales for the target."""
    delta, X = torch.zeros(M, 3, requires_grad=True), torch.randn(200, N, generator=torch.Generator().manual_seed(2))
    loss = lambda: (fb.PEQA(32).forward({"delta": delta}, X, Base(q)) - X @ target.mT).square().mean()  # noqa: E731
    start, optimizer = loss().item(), torch.optim.LBFGS([delta], max_iter=60, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return start, loss().item()


def test_learns_scales_and_no_shift_of_a_low_rank() -> None:
    """A LoRA in disguise would fail at one of the two."""
    q, gen = base(), torch.Generator().manual_seed(3)
    scaled = fb.PEQA(32).merged({"delta": 0.2 * torch.randn(M, 3, generator=gen)}, q)
    start, end = fitted(scaled, q)
    assert end < 1e-6 * start
    start, end = fitted(q.dequantize() + 0.3 * torch.randn(M, 4, generator=gen) @ torch.randn(4, N, generator=gen), q)
    assert end > 0.9 * start


def test_codes_stay_and_tasks_are_switched() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 8))
    specs = {
        "0": fb.Spec(fb.Int(3, 32), adapter=fb.PEQA(32)),
        "2": fb.Spec(fb.Int(4, "row", False, variant="integer"), adapter=fb.PEQA("row")),
    }
    model, x = fb.build(net, fb.Plan(specs)), torch.randn(6, N)
    hosts = dict(fb.hosts(model))
    parts = {n: {k: t.clone() for k, t in h.weight.parts.items()} for n, h in hosts.items()}
    plain = model(x).detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(h.p["default"]["delta"]) for h in hosts.values()}
    tasks = []
    for seed in (1, 2):
        for p in trained:
            p.data.zero_()
        assert torch.equal(model(x), plain)
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()
        tasks.append(([p.detach().clone() for p in trained], model(x).detach()))
    assert not torch.equal(tasks[0][1], tasks[1][1])
    assert all(torch.equal(t, parts[n][k]) for n, h in hosts.items() for k, t in h.weight.parts.items())
    for deltas, wanted in (*tasks, tasks[0]):
        for p, delta in zip(trained, deltas, strict=True):
            p.data.copy_(delta)
        assert torch.equal(model(x), wanted)


def test_a_scale_keeps_its_sign() -> None:
    q = base()
    tuned = fb.PEQA(32).coded({"delta": torch.full((M, 3), -9.0)}, q)
    assert (tuned.parts["scale"] > 0).all()
