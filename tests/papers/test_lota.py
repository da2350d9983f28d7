"""LoTA-QAF: ternary adapters move codes by a step, what is merged is what was computed with, and t-SignSGD keeps them ternary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finebits as fb
from finebits.adapters.base import Base
from finebits.layouts.gguf import from_gguf, to_gguf
from finebits.layouts.gptq import from_gptq, to_gptq
from finebits.optim.t_sign_sgd import TSignSGD
from finebits.served import served
from tiny_llama import worded

M, N, R = 24, 80, 4
REAL, WHOLE = fb.Int(4, 32, False, "fp32"), fb.Int(3, 32, False, "fp16", "integer")


def ternary(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def given(format: fb.Int) -> tuple[fb.QTensor, dict[str, Tensor]]:
    q = fb.quantize(torch.randn(M, N, generator=torch.Generator().manual_seed(1)), format)
    return q, {"A": ternary(R, N), "B": ternary(M, R, seed=1)}


def straight(D: Tensor, q: fb.QTensor, omega: float) -> tuple[Tensor, Tensor]:
    """(Ŵ where the grid goes on, μ spread over its block) by the formulas, whose gradients go straight through steps."""
    codes, most = q.codes(), 2**q.format.bits - 1
    step = ((D > omega) & (codes < most)).to(D.dtype) - ((D < -omega) & (codes > 0)).to(D.dtype)
    rest = (D - omega * step).split(32, 1)
    mu = torch.cat([(t.mean(1, keepdim=True) / omega).expand_as(t) for t in rest], 1)
    return D + (step - D).detach(), mu


@pytest.mark.parametrize("format", [REAL, WHOLE], ids=["real", "whole"])
def test_it_is_the_formula_and_its_gradients(format: fb.Int) -> None:
    q, own = given(format)
    adapter, found = fb.LoTA(rank=R, threshold=0.4), []
    gen = torch.Generator().manual_seed(2)
    X, G = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((10, N), (10, M)))
    scale = format.spread(q.parts["scale"].double(), N)

    def plain(p: dict[str, Tensor], x: Tensor) -> Tensor:
        step, mu = straight(p["B"].double() @ p["A"].double(), q, adapter.omega)
        return x @ (q.dequantize().double() + scale * (step + (mu if format.form == "real" else 0))).mT

    for forward in (lambda p, x: adapter.forward(p, x, Base(q)), plain):
        p, x = {k: v.clone().requires_grad_() for k, v in own.items()}, X.clone().requires_grad_()
        y = forward(p, x)
        y.backward(G)
        found.append([y.detach(), x.grad, p["A"].grad, p["B"].grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5 * float(theirs.abs().max()), check_dtype=False)


def test_codes_move_by_at_most_a_step_and_stay_on_the_grid() -> None:
    q, p = given(REAL)
    tuned = fb.LoTA(rank=R, threshold=0.4).coded(p, q)
    moved = tuned.codes().int() - q.codes().int()
    assert set(moved.unique().tolist()) == {-1, 0, 1} and torch.equal(tuned.parts["scale"], q.parts["scale"])
    ends = (q.codes() == 15) & (p["B"] @ p["A"] > 1.6) | (q.codes() == 0) & (p["B"] @ p["A"] < -1.6)
    assert ends.any() and not moved[ends].any()


def test_layouts_hold_it_as_it_is() -> None:
    for format, there_and_back in (
        (fb.Int(4, 32, False, "fp16"), lambda t: from_gguf(*to_gguf(t))),
        (WHOLE, lambda t: from_gptq(to_gptq(t, "gptq_v2"), 3, False, "gptq_v2", torch.float32)),
    ):
        q = fb.quantize(torch.randn(32, 96, generator=torch.Generator().manual_seed(1)), format)
        tuned = fb.LoTA(rank=R, threshold=0.4).coded({"A": ternary(R, 96), "B": ternary(32, R, seed=1)}, q)
        assert not torch.equal(tuned.codes(), q.codes())
        assert torch.equal(there_and_back(tuned).dequantize(torch.float32), tuned.dequantize(torch.float32))


def test_it_is_born_as_the_base_with_ternary_factors() -> None:
    q, _ = given(REAL)
    adapter = fb.LoTA(rank=R)
    p = adapter.params(Base(q), torch.Generator().manual_seed(0), {})
    assert set(p["A"].unique().tolist()) == {-1.0, 0.0, 1.0} and not p["B"].any()
    assert torch.equal(adapter.merged(p, q), q.dequantize())
    with pytest.raises(ValueError, match="threshold is 1"):
        fb.LoTA(threshold=1.0)


@pytest.mark.parametrize(("bits", "left"), [(2, 0.8), (4, 0.95)])
def test_codes_learn_a_shift_as_far_as_a_step_goes(bits: int, left: float) -> None:
    """Of rank 2, on batches of a few rows, whose noise moves what the largest gradients of all rows would leave at its end."""
    torch.manual_seed(0)
    adapter = fb.LoTA(rank=8, threshold=0.4)
    plan = fb.Plan({"0": fb.Spec(fb.Int(bits, 32, False, "fp32"), adapter=adapter)})
    model = fb.build(nn.Sequential(nn.Linear(64, 48, bias=False)), plan)
    host = dict(model.named_modules())["0"]
    target = host.weight.dequantize() + 0.05 * torch.randn(48, 2) @ torch.randn(2, 64)
    X = torch.randn(512, 64)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, first = TSignSGD().make(trained, lr=0.05), F.mse_loss(model(X), F.linear(X, target)).item()
    for i in range(150):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 150)
        optimizer.zero_grad()
        few = X[torch.randint(512, (8,))]
        F.mse_loss(model(few), F.linear(few, target)).backward()
        optimizer.step()
    assert all(bool(((p == 0) | (p.abs() == 1)).all()) for p in trained)
    assert F.mse_loss(model(X), F.linear(X, target)).item() < left * first
    assert not torch.equal(served(host).codes(), host.weight.codes())
    torch.testing.assert_close(F.linear(X, served(host).dequantize()), model(X), rtol=1e-5, atol=1e-5)


def test_t_sign_sgd_is_refused_where_numbers_are_not_ternary() -> None:
    with pytest.raises(ValueError, match=r"one of \(2, 3\) has other numbers: train the adapter lota"):
        TSignSGD().make([nn.Parameter(torch.full((2, 3), 0.5))], lr=0.05)
    with pytest.raises(ValueError, match="share of entries that step"):
        TSignSGD().make([nn.Parameter(torch.zeros(2))], lr=2.0)


def test_its_optimizer_is_for_its_tensors_alone(tmp_path: Path) -> None:
    model = worded(tmp_path / "model", hidden_size=16, intermediate_size=16)
    with pytest.raises(ValueError, match="t_sign_sgd steps the tensors of adapter lota alone, and LoRA has others: take that adapter"):
        fb.plan_model(str(model), "1GiB", optim="t_sign_sgd", fast=True)
