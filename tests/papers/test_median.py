"""Quantile-median grids."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.median import Median


def test_grids() -> None:
    assert Median(1).levels() == pytest.approx((-0.6745, 0.6745), abs=1e-4)
    assert Median(2).levels() == pytest.approx((-1.2657, -0.3778, 0.3778, 1.2657), abs=1e-3)


def test_one_bit_is_the_best_by_mean_absolute_error() -> None:
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    error = lambda a: float((x - a * x.sign()).abs().mean())  # noqa: E731
    assert error(0.6745) == pytest.approx(0.4728, abs=1e-3) and error(0.7979) == pytest.approx(0.4825, abs=1e-3)


def test_mean_and_deviation_of_a_matrix() -> None:
    W = 3 + 2 * torch.randn(8, 50)
    q = fb.quantize(W, Median(2, "tensor"))
    torch.testing.assert_close(q.parts["shift"], W.mean()[None])
    torch.testing.assert_close(q.parts["scale"], W.std()[None])
    assert 8 * q.nbytes == Median(2, "tensor").storage_bits(8, 50) == 8 * 13 * 8 + 64


def test_storage_of_the_adapters_of_a_vision_transformer() -> None:
    one = Median(1, "tensor")
    both = one.storage_bits(32, 768) + one.storage_bits(768, 32)
    assert 12 * both / 8 / 1024 == pytest.approx(72.2, abs=0.05)


def test_a_single_weight_and_a_constant_block_are_kept() -> None:
    W = torch.full((2, 65), 0.3)
    assert torch.equal(fb.quantize(W, Median(1, 64)).dequantize(), W)
