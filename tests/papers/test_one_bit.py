"""One-bit adapters (arXiv:2307.16867): factors that are computed with in one bit a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finebits as fb
from finebits import store
from finebits.adapters._coarse import coarse
from finebits.adapters.base import Base
from finebits.tensorfile import Stored


@pytest.mark.parametrize(("bits", "grid"), [(1, [-0.6745, 0.6745]), (2, [-1.2657, -0.3778, 0.3778, 1.2657])])
def test_a_factor_has_the_values_of_the_grid(bits: int, grid: list[float]) -> None:
    w = torch.randn(50, 40) * 0.3 + 2
    values = (coarse(w, bits).unique() - w.mean()) / w.std()
    torch.testing.assert_close(values.round(decimals=3).unique(), torch.tensor(grid).round(decimals=3), atol=2e-3, rtol=0)


def test_the_gradient_is_the_straight_through_one_with_mean_and_deviation_moving() -> None:
    """ŵ = (v + c)·σ + μ with c held: the derivative by finite differences of that, in float32."""
    w, C = torch.randn(30), torch.randn(30)
    held = (coarse(w, 1) - w.mean()) / w.std() - (w - w.mean()) / (w.std() + 1e-5)
    leaf = w.clone().requires_grad_()
    (coarse(leaf, 1) * C).sum().backward()
    other = w.clone().requires_grad_()
    ((((other - other.mean()) / (other.std() + 1e-5) + held) * other.std() + other.mean()) * C).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-3, atol=1e-3)
    assert leaf.grad.all()  # type: ignore[union-attr]


def test_at_equal_storage_one_bit_learns_more_than_thirty_two() -> None:
    """A shift of rank 8 of a 64 → 32 layer with ReLU: 1 bit of rank 32 beside 32 bits of rank 1."""

    def share(adapter, steps: int = 250) -> float:
        gen = torch.Generator().manual_seed(0)
        W = torch.randn(32, 64, generator=gen) / 8
        shift = torch.randn(32, 8, generator=gen) @ torch.randn(8, 64, generator=gen) / 8 / 8**0.5
        x = torch.randn(1000, 64, generator=gen)
        wanted, base = F.relu(x @ (W + shift).mT), Base(W)
        p = {k: t.requires_grad_() for k, t in adapter.params(base, gen, {}).items()}
        optimizer = torch.optim.Adam(p.values(), lr=1e-2)
        first = loss = F.mse_loss(F.relu(x @ W.mT), wanted)
        for _ in range(steps):
            loss = F.mse_loss(F.relu(adapter.forward(p, x, base)), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return 1 - float((loss / first).detach())

    assert share(fb.OneBit(rank=32, alpha=32.0)) > 1.5 * share(fb.LoRA(rank=1, alpha=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2])
def test_a_saved_adapter_is_its_bits_and_comes_back_to_the_bit(bits: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bytes of the file: the formula beside a header; and again after more training and saving."""
    plan = fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.OneBit(rank=5, bits=bits))})
    weights = nn.Sequential(nn.Linear(64, 31)).state_dict()

    def fresh() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(64, 31))
        model.load_state_dict(weights)
        return model

    model, x = fb.build(fresh(), plan), torch.randn(7, 64, dtype=dtype)
    for p in model[0].p.parameters():
        p.data.add_(0.3 * torch.randn(p.shape) + 0.01)
    fb.save(model, tmp_path / "x")
    held = {k: t.numel() * t.element_size() for k, t in Stored(tmp_path / "x" / "adapter.safetensors").items()}
    assert held == {
        "0.default.A_codes": -(-5 * 64 * bits // 8),
        "0.default.A_at": 8,
        "0.default.B_codes": -(-5 * 31 * bits // 8),
        "0.default.B_at": 8,
    }
    again = store.apply(fresh(), store.read(tmp_path / "x"))
    assert torch.equal(again(x), model(x))
    (again(x) ** 2).sum().backward()
    assert all(p.grad.abs().gt(0).any() for p in again[0].p.parameters())
    fb.save(again, tmp_path / "y")
    assert torch.equal(store.apply(fresh(), store.read(tmp_path / "y"))(x), model(x))


def test_other_widths_are_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match="bits is 3"):
        fb.OneBit(bits=3)  # type: ignore[arg-type]
