"""Bi-AdaptFormer (arXiv:2307.16867v1): a parallel bottleneck whose factors are computed with in one bit a number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import finebits as fb
import tiny_llama as tiny
from finebits import store
from finebits.adapters.base import FeedForward
from finebits.tensorfile import Stored


def sublayer(d: int) -> FeedForward:
    return FeedForward(torch.tanh, lambda x: (None, x), torch.relu, lambda h: h, (2 * d, d))


@pytest.mark.parametrize("bits", [1, 2])
def test_it_is_a_parallel_branch_of_quantized_factors(bits: Any) -> None:
    """Of one bit: mean ± .6745 deviations, by the side of the mean that a number lies on; of two, the medians of the quarters' halves."""

    def hat(w: torch.Tensor) -> torch.Tensor:
        v = (w - w.mean()) / w.std()
        if bits == 1:
            return torch.where(v > 0, 0.6745, -0.6745) * w.std() + w.mean()
        size = torch.where(v.abs() > (0.3778 + 1.2657) / 2, 1.2657, 0.3778)
        return v.sign() * size * w.std() + w.mean()

    adapter, x = fb.BiAdaptFormer(units=6, bits=bits, scale=10.0), torch.randn(5, 16)
    p = {"down": torch.randn(6, 16) + 0.1, "up": torch.randn(16, 6) - 0.2}
    wanted = torch.tanh(x) + 10 * F.relu(x @ hat(p["down"]).mT) @ hat(p["up"]).mT
    torch.testing.assert_close(adapter.forward(p, x, sublayer(16)), wanted, rtol=2e-3, atol=2e-2)


def test_the_published_size() -> None:
    """ViT-B, 12 sublayers of 768: 72.2 KiB for the 32 units of all of them."""
    adapter, d = fb.BiAdaptFormer(units=32), 768
    p = adapter.params(sublayer(d), torch.Generator().manual_seed(0), {})
    size = 12 * sum(t.numel() * t.element_size() for t in adapter.packed(p).values())
    assert size == 12 * 2 * (d * 32 // 8 + 8) and round(size / 1024, 1) == 72.2


@pytest.mark.parametrize(("bits", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_a_saved_one_is_its_bits_and_comes_back_to_the_bit(bits: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    plan = fb.Plan({}, over={f"model.layers.{i}.mlp": fb.BiAdaptFormer(units=5, bits=bits) for i in range(2)})
    model, ids = fb.build(tiny.fresh(dtype=dtype), plan), torch.arange(3, 20)[None]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape) + 0.01)
    fb.save(model, tmp_path / "x")
    held = {k: t.numel() * t.element_size() for k, t in Stored(tmp_path / "x" / "adapter.safetensors").items()}
    assert len(held) == 8 and sorted(set(held.values())) == [8, math.ceil(5 * 64 * bits / 8)]
    again = store.apply(tiny.fresh(dtype=dtype), store.read(tmp_path / "x"))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_every_number_learns_where_no_sign_changes() -> None:
    adapter, x = fb.BiAdaptFormer(units=4), torch.randn(9, 8)
    p = {k: t.requires_grad_() for k, t in adapter.params(sublayer(8), torch.Generator().manual_seed(1), {}).items()}
    adapter.forward(p, x, sublayer(8)).square().sum().backward()
    assert all(t.grad is not None and t.grad.all() for t in p.values())


def test_bad_settings_are_refused() -> None:
    for wrong, said in (({"units": 0}, "units >= 1"), ({"scale": 0.0}, "scale > 0")):
        with pytest.raises(ValueError, match=said):
            fb.BiAdaptFormer(**wrong)
