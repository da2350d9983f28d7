"""HQQ: sparse errors, without data."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.quantizers.hqq import HQQ
from finebits.quantizers.rtn import RTN


@pytest.mark.parametrize("format", [fb.Int(2, symmetric=False), fb.Int(3, symmetric=False), fb.NF(3), fb.Int(3)], ids=str)
def test_the_absolute_error_falls(format: fb.NF) -> None:
    W = torch.randn(21, 170)
    W[torch.rand(W.shape) < 0.01] *= 4
    error = lambda q: (q.dequantize() - W).abs().sum(-1)  # noqa: E731
    ours, plain = error(HQQ()(W, format, {})), error(RTN()(W, format, {}))
    assert (ours <= plain * (1 + 1e-6)).all() and ours.sum() < 0.98 * plain.sum()


def test_only_the_shift_moves_where_there_is_one() -> None:
    W, format = torch.randn(5, 100), fb.Int(3, block=50, symmetric=False)
    assert torch.equal(HQQ()(W, format, {}).parts["scale"], RTN()(W, format, {}).parts["scale"])
    assert not torch.equal(HQQ()(W, format, {}).parts["shift"], RTN()(W, format, {}).parts["shift"])


def test_no_step_is_round_to_nearest() -> None:
    W, format = torch.randn(5, 100), fb.Int(4, block=32, symmetric=False)
    assert torch.equal(HQQ(steps=0)(W, format, {}).codes(), RTN()(W, format, {}).codes())


def test_golden_values_of_one_alternation() -> None:
    """The authors' three lines (shrink, then the mean over the block) in NumPy, in units of the scale, on one block of a row."""
    import numpy as np

    W, format = torch.tensor([[-1.0, 2.0, *(0.3 + 0.01 * i for i in range(14))]]), fb.Int(2, block=16, symmetric=False)
    w, beta, p = W[0].double().numpy(), 10.0, 0.7
    s, z = 1.0, -1.0  # (2 − (−1)) / 3 and the minimum
    hat = s * np.clip(np.round((w - z) / s), 0, 3) + z
    x = w - hat
    We = np.sign(x) * np.maximum(np.abs(x) - p * np.maximum(np.abs(x), 1e-8) ** (p - 1) / beta, 0)
    z1 = np.mean(w - We - (hat - z))
    hat1 = s * np.clip(np.round((w - z1) / s), 0, 3) + z1
    assert np.abs(w - hat1).sum() < np.abs(w - hat).sum()
    q = HQQ(steps=1)(W, format, {})
    assert float(q.parts["shift"]) == pytest.approx(z1, rel=1e-5)
    torch.testing.assert_close(q.dequantize()[0].double(), torch.from_numpy(hat1), rtol=0, atol=1e-5)


def test_units_do_not_matter() -> None:
    W, format = torch.randn(5, 96), fb.Int(3, block=32, symmetric=False)
    assert torch.equal(HQQ()(1024 * W, format, {}).codes(), HQQ()(W, format, {}).codes())


def test_settings_are_checked() -> None:
    for setting in ({"p": 0.0}, {"beta": 0.0}, {"kappa": 0.5}, {"steps": -1}):
        with pytest.raises(ValueError, match="HQQ needs"):
            HQQ(**setting)
