"""CALDERA and CLoQ: calibrated quantizer and calibrated low-rank part, alternated."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

import finebits as fb
from finebits.init.caldera import Caldera
from finebits.init.loftq import LoftQ
from finebits.init.qera import QERA
from finebits.plan.base import Plan, Spec
from finebits.quantizers.gptq import GPTQ
from finebits.stats.gram import Gram
from golden.values import golden
from papers.gram import inputs, output_error, seen

FORMAT = fb.NF(2, block=32)


def error(init, W, stats, calibrated: bool) -> float:  # noqa: ANN001
    adapter = fb.LoRA(rank=6, alpha=24.0)
    quantize = lambda V: (GPTQ() if calibrated else fb.RTN())(V, FORMAT, stats)  # noqa: E731
    Q, p = init(W, adapter, quantize, stats)
    return output_error(adapter.merged(p, Q), W, stats[Gram].value())


def test_each_part_helps() -> None:
    W, stats = torch.randn(40, 96), seen(inputs(400, 96), None, Gram)
    loftq = error(LoftQ(), W, stats, False)
    qera, cloq = error(QERA(), W, stats, False), error(Caldera(steps=1, order="quantize"), W, stats, True)
    caldera = error(Caldera(), W, stats, True)
    assert caldera < cloq < qera < loftq
    assert caldera < 0.35 * loftq


def test_one_step_is_the_closed_form() -> None:
    W, stats = torch.randn(20, 45), seen(inputs(200, 45), None, Gram)
    one, other = error(Caldera(steps=1, order="quantize"), W, stats, True), error(QERA(), W, stats, True)
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("order", ["svd", "quantize"])
def test_more_steps_never_lose(order: str) -> None:
    W, stats = torch.randn(20, 45), seen(inputs(200, 45), None, Gram)
    losses = [error(Caldera(steps=t, order=order), W, stats, True) for t in (1, 2, 4, 7)]
    assert all(b <= a * (1 + 1e-5) for a, b in zip(losses, losses[1:], strict=False))


def test_a_plan_collects_what_it_needs_and_builds() -> None:
    """Quantizer and start both read the Gram matrix that one pass gathered; the outputs come nearer than with zeros."""
    torch.manual_seed(5)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.ReLU(), torch.nn.Linear(64, 24))  # noqa: E731
    model, batches = make(), [inputs(50, 40) for _ in range(4)]
    state, x = {k: v.clone() for k, v in model.state_dict().items()}, inputs(90, 40)
    y, far = model(x), {}
    for name, quantizer, init in (("zeros", fb.RTN(), fb.Zeros()), ("ours", GPTQ(scales="search"), fb.Auto(("qera", "caldera")))):
        spec = Spec(format=fb.NF(2, block=16), quantizer=quantizer, adapter=fb.LoRA(rank=4, alpha=8.0), init=init)
        plan = Plan({"0": spec, "2": spec})
        copy = make()
        copy.load_state_dict(state)
        stats = fb.collect(copy, batches, lambda m, b: m(b).sum(), fb.needs(plan))
        far[name] = float((fb.build(copy, plan, stats)(x) - y).detach().square().mean())
    assert far["ours"] < 0.25 * far["zeros"]


@pytest.mark.parametrize(("order", "steps", "suffix"), [("svd", 4, "_svd"), ("quantize", 5, "")])
def test_the_authors_parts(order: Literal["svd", "quantize"], steps: int, suffix: str) -> None:
    """Five of their iterations that begin with an SVD hold four that end with one, and the best of both ends so."""
    theirs, adapter = golden("caldera"), fb.LoRA(rank=5, alpha=8.0)
    quantize = lambda V: (7 * V / V.abs().max()).round() * V.abs().max() / 7  # noqa: E731
    Q, p = Caldera(steps=steps, order=order, damp=0.0)(theirs["W"], adapter, quantize, seen(theirs["X"], None, Gram))
    torch.testing.assert_close(Q, theirs[f"Q{suffix}"], rtol=0, atol=1e-4)
    torch.testing.assert_close(adapter.s * p["B"] @ p["A"], theirs[f"LR{suffix}"], rtol=0, atol=1e-4)
