"""LoftQ (arXiv:2310.08659): the theorem of the last step, and the anchors of its alternation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import finebits as fb
from finebits.qtensor import dense
from golden.values import golden


def rtn(bits: int) -> Any:
    return lambda V: fb.quantize(V, fb.NF(bits, block=64))


def left(W: Tensor, base: Tensor, p: dict[str, Tensor], s: float) -> float:
    return float((W - dense(base) - s * p["B"] @ p["A"]).norm() / W.norm())


def start(W: Tensor, bits: int, **kw: Any) -> float:
    lora = fb.LoRA(rank=16, alpha=16.0)
    return left(W, *fb.LoftQ(**kw)(W, lora, rtn(bits), {}), lora.s)


def gaussian(seed: int = 0) -> Tensor:
    return torch.randn(256, 256, generator=torch.Generator().manual_seed(seed))


def power_law() -> Tensor:
    U, V = torch.linalg.qr(torch.randn(256, 256)).Q, torch.linalg.qr(torch.randn(256, 256)).Q
    return U / torch.arange(1, 257) @ V.mT


def outliers() -> Tensor:
    W = torch.randn(256, 256)
    W[:, torch.randperm(256)[:8]] *= 10
    return W


def test_one_step_has_the_plain_codes_and_leaves_the_tail() -> None:
    W, lora = gaussian(), fb.LoRA(rank=16, alpha=32.0)
    q, p = fb.LoftQ(steps=1)(W, lora, rtn(3), {})
    plain = rtn(3)(W)
    assert torch.equal(q.parts["codes"], plain.parts["codes"])
    tail = torch.linalg.svdvals(W - plain.dequantize())[16:].square().sum()
    rest = (W - q.dequantize() - lora.s * p["B"] @ p["A"]).square().sum()
    torch.testing.assert_close(rest, tail, rtol=2e-3, atol=0)
    assert rest >= tail * (1 - 1e-5)


@pytest.mark.parametrize("shape", [(61, 83), (83, 61)], ids=str)
@pytest.mark.parametrize("alpha", [2.0, 7.0, 40.0])
def test_what_is_left_is_the_tail_of_the_spectrum(shape: tuple[int, int], alpha: float) -> None:
    """‖W − Q − s·B A‖² = Σ_{i>r} σ_i(W − Q)²; odd shapes, any scale."""
    W, lora = torch.randn(shape), fb.LoRA(rank=7, alpha=alpha)
    q, p = fb.LoftQ(steps=3)(W, lora, rtn(3), {})
    tail = torch.linalg.svdvals((W - q.dequantize()).double())[7:].square().sum()
    rest = (W - q.dequantize() - lora.s * p["B"] @ p["A"]).double().square().sum()
    torch.testing.assert_close(rest, tail, rtol=1e-5, atol=0)


def test_the_authors_loop() -> None:
    """The product is compared, since signs of factors are free; every step gains here, so that their last iterate is the best."""
    theirs, lora = golden("loftq"), fb.LoRA(rank=4, alpha=10.0)
    q, p = fb.LoftQ(steps=3)(theirs["W"], lora, rtn(4), {})
    torch.testing.assert_close(q.dequantize(), theirs["Q"], rtol=0, atol=1e-5)
    torch.testing.assert_close(lora.s * p["B"] @ p["A"], theirs["LR"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("bits", "anchors"), [(4, (0.0921, 0.0818, 0.0719)), (3, (0.2005, 0.1781, 0.1581))])
def test_anchors_of_a_gaussian(bits: int, anchors: tuple[float, float, float]) -> None:
    W = gaussian()
    plain = float((W - rtn(bits)(W).dequantize()).norm() / W.norm())
    got = (plain, start(W, bits, steps=1), start(W, bits, steps=5))
    assert got == pytest.approx(anchors, rel=0.02)
    assert got[2] <= 0.82 * got[0]


@pytest.mark.parametrize(("make", "at_most"), [(gaussian, 0.97), (power_law, 0.4), (outliers, 0.45)])
@pytest.mark.parametrize("bits", [4, 3])
def test_order_matters_more_for_structured_weights(make: Any, at_most: float, bits: int) -> None:
    W = make()
    assert start(W, bits, steps=8, order="svd") <= at_most * start(W, bits, steps=5)


@pytest.mark.parametrize("order", ["quantize", "svd"])
def test_more_steps_never_hurt_because_the_best_is_kept(order: str) -> None:
    W = gaussian()
    errors = [start(W, 2, steps=t, order=order) for t in range(1, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


@pytest.mark.parametrize("alpha", [1.0, 16.0, 64.0])
def test_the_adapters_scale_is_divided_out(alpha: float) -> None:
    """What a start that ignores s = α/r gets wrong (a known fault elsewhere)."""
    W, lora = gaussian(), fb.LoRA(rank=16, alpha=alpha)
    assert left(W, *fb.LoftQ(steps=1)(W, lora, rtn(4), {}), lora.s) == pytest.approx(start(W, 4, steps=1), rel=1e-5)
    stable = fb.LoRA(rank=16, alpha=alpha, scaling="rslora")
    assert left(W, *fb.LoftQ(steps=1)(W, stable, rtn(4), {}), stable.s) == pytest.approx(start(W, 4, steps=1), rel=1e-5)


def test_energy_is_shared_evenly_between_the_factors() -> None:
    _, p = fb.LoftQ()(gaussian(), fb.LoRA(rank=8, alpha=8.0), rtn(3), {})
    torch.testing.assert_close(p["B"].norm(dim=0), p["A"].norm(dim=1), rtol=1e-3, atol=1e-5)


def test_an_unquantized_base_gets_a_live_adapter() -> None:
    base, p = fb.LoftQ()(gaussian(), fb.LoRA(rank=8), lambda V: V, {})
    assert torch.equal(base, gaussian()) and p == {}


@pytest.mark.parametrize("bad", [{"steps": 0}, {"order": "both"}], ids=str)
def test_a_setting_without_meaning_is_refused(unchecked: None, bad: dict) -> None:
    with pytest.raises(ValueError, match="LoftQ|order"):
        fb.LoftQ(**bad)
