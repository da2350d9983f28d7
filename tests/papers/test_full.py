"""Weights that are trained themselves: dense ones as torch trains them, those in codes by their dense gradient and rounding without bias."""

from __future__ import annotations

import gc
import io
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits.optim import _shell as shell_module
from finebits.optim._shell import by_chance, made
from finebits.optim.base import named
from finebits.qtensor import QTensor
from finebits.rewrite import rewrite


def net(*formats: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))
    return fb.build(model, fb.Plan({n: fb.Spec(f, adapter=fb.Full()) for n, f in zip(("0", "2", "4"), formats, strict=True)}))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss(model: nn.Module, seed: int, rows: int = 6) -> Tensor:
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    return model(x).square().sum()


@pytest.mark.parametrize("format", [fb.Int(8), fb.Int(8, 256, False), fb.NF(4), fb.Int(3, symmetric=False, variant="integer"), fb.FP8()])
def test_the_gradient_of_a_weight_in_codes_is_that_of_the_dense_one(format: Any) -> None:
    model, dense = net(format, None, format), net(None, None, None)
    for n in ("0", "4"):
        dense.get_submodule(n).weight.data = model.get_submodule(n).weight.dequantize().detach()
    for m in (model, dense):
        loss(m, 1).backward()
        loss(m, 2).backward()  # gradients of micro-batches add up
    ours, theirs = trained(model), trained(dense)
    assert [type(p.data) for p in ours] == [QTensor, Tensor, QTensor] and len(theirs) == 3
    for p, q in zip(ours, theirs, strict=True):
        assert type(p.grad) is Tensor
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nn.utils.clip_grad_norm_(ours, 1.0), nn.utils.clip_grad_norm_(theirs, 1.0))


def test_dense_weights_are_trained_as_torch_trains_them() -> None:
    model, theirs = net(None, None, None), net(None, None, None)
    ours, adam = made(named("adamw"), trained(model), 0.01), torch.optim.AdamW(trained(theirs), lr=0.01)
    for i in range(5):
        for m, o in ((model, ours), (theirs, adam)):
            loss(m, i).backward()
            o.step()
            o.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(trained(model), trained(theirs), strict=True))


def test_rounding_by_chance_has_no_bias() -> None:
    """Weights inside a group whose extremes stand still, moved 300 times by a fifteenth of a step: by 20 on average, and by 0 to nearest."""
    q = fb.quantize(torch.tensor([[-127.0] + [0.0] * 254 + [127.0]]), fb.Int(8, 256))
    moved = {}
    for gen in (torch.Generator().manual_seed(0), None):
        rewrite(q, torch.tensor([[-127.0] + [0.0] * 254 + [127.0]]), gen)
        step = torch.tensor([[0.0] + [1 / 15] * 254 + [0.0]])
        for _ in range(300):
            rewrite(q, q.dequantize() + step, gen)
        moved[gen is None] = q.dequantize()[0, 1:-1]
    assert abs(float(moved[False].mean()) - 20) < 4 * math.sqrt(300 / 15 * 14 / 15 / 254) and float(moved[False].std()) < 6
    assert torch.equal(moved[True], torch.zeros(254))


@pytest.mark.parametrize("format", [fb.Int(4), fb.Int(2, symmetric=False), fb.NF(3), fb.FP4()])
def test_it_goes_to_one_of_the_two_levels_around_and_is_right_on_average(format: Any) -> None:
    gen, W = torch.Generator().manual_seed(0), torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    q = fb.quantize(W, format)
    scales = format.scales(format.fit(W), 64)
    levels = (torch.tensor(sorted(set(format.levels())))[:, None, None] * format.spread(scales.scale.float(), 64)).sort(0).values
    levels = levels if scales.shift is None else levels + format.spread(scales.shift.float(), 64)
    inside = W.clamp(levels[0], levels[-1])
    below = torch.where(levels <= inside + 1e-6, levels, -torch.inf).amax(0)
    above = torch.where(levels >= inside - 1e-6, levels, torch.inf).amin(0)
    total = torch.zeros_like(W)
    for _ in range(400):
        rewrite(q, W, gen)
        V = q.dequantize()
        assert bool((((V - below).abs() < 1e-5) | ((V - above).abs() < 1e-5)).all())
        total += V
    assert bool(((total / 400 - inside).abs() <= 5 * (above - below) / 2 / 20 + 1e-4).all())


@pytest.mark.parametrize(
    "W", [torch.linspace(2, 3, 256), torch.linspace(-3, -2, 256), torch.full((256,), 0.5), torch.linspace(-1, 2, 256)], ids=str
)
def test_groups_of_one_sign_keep_half_a_step(W: Tensor) -> None:
    for variant in (None, "integer"):
        q = fb.quantize(torch.zeros(1, 256), fb.Int(8, 256, False, variant=variant))
        rewrite(q, W[None])
        low, high = (W.min(), W.max()) if variant is None else (W.min().clamp(max=0), W.max().clamp(min=0))
        assert float((q.dequantize()[0] - W).abs().max()) <= float(high - low) / 255 * 0.501 + 1e-6


def test_sixteen_bits_keep_small_steps_on_average() -> None:
    gen, W = torch.Generator().manual_seed(0), torch.ones(4000, dtype=torch.bfloat16)
    near = W.clone()
    for _ in range(100):
        W, near = by_chance(W.float() + 2**-12, torch.bfloat16, gen), (near.float() + 2**-12).bfloat16()
    assert float(near.float().mean()) == 1.0 and float(W.float().mean()) == pytest.approx(1 + 100 * 2**-12, abs=1e-3)
    big = torch.tensor([-3e38, 0.0, 1e-41, -2.5])
    assert torch.equal(by_chance(big, torch.bfloat16, gen).isfinite(), torch.ones(4).bool())


def test_nothing_dense_of_a_weight_in_codes_lives_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []
    before = shell_module.rewrite

    def watched(q: QTensor, W: Tensor, gen: Any) -> None:
        seen.append(weakref.ref(W))
        before(q, W, gen)

    monkeypatch.setattr(shell_module, "rewrite", watched)
    model = net(fb.Int(8), fb.Int(8), fb.NF(4))
    optimizer = made(named("adamw"), trained(model), 0.01)
    codes = [p.parts["codes"].data_ptr() for p in trained(model)]
    loss(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert len(seen) == 3 and all(ref() is None for ref in seen)
    assert [p.parts["codes"].data_ptr() for p in trained(model)] == codes  # in place


def test_goes_on_from_a_checkpoint_to_the_bit() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
        losses = []
        for i in range(first, first + 3):
            value = loss(model, i)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        return losses

    whole, again = net(fb.Int(8), None, fb.NF(4)).bfloat16(), net(fb.Int(8), None, fb.NF(4)).bfloat16()
    for m in (whole, again):
        m.register_forward_pre_hook(lambda m, args: (args[0].bfloat16(),))
    one = made(named("adamw"), trained(whole), 0.01, seed=3)
    run(whole, one, 0)
    file = io.BytesIO()
    torch.save([one.state_dict(), whole.state_dict()], file)
    file.seek(0)
    optimizer, tensors = torch.load(file, weights_only=True)
    two = made(named("adamw"), trained(again), 0.01, seed=3)
    two.load_state_dict(optimizer)
    again.load_state_dict(tensors)
    assert run(whole, one, 3) == run(again, two, 3)


def test_what_was_trained_is_saved_and_loaded(tmp_path: Path) -> None:
    model = net(fb.Int(8), None, fb.NF(4))
    optimizer = made(named("adamw"), trained(model), 0.01)
    loss(model, 0).backward()
    optimizer.step()
    for p in trained(model)[:2]:
        p.requires_grad_(False)  # a rule may leave them alone for a while: they are trained all the same
    fb.save(model, tmp_path / "m")
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))
    from finebits.store import apply, read

    loaded = apply(fresh, read(tmp_path / "m"))
    assert len(trained(loaded)) == 3 and torch.equal(loss(loaded, 5), loss(model, 5))


def test_a_code_of_several_weights_is_refused() -> None:
    q = fb.quantize(torch.randn(8, 64), fb.VQ(M=1, g=8))
    with pytest.raises(ValueError, match="VQ holds several weights in a code, and none of them moves alone"):
        rewrite(q, torch.zeros(8, 64))
