"""HQQ: sparse errors, without data."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.quantizers.hqq import HQQ
from finebits.quantizers.rtn import RTN
from golden.values import golden


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


def test_the_authors_alternation() -> None:
    """Blocks whose scale is one, so that their units are ours, and where every step gains, so that their last iterate is the best."""
    theirs = golden("hqq")
    found = HQQ(steps=3)(theirs["W"], fb.Int(2, block=16, symmetric=False), {}).dequantize()
    torch.testing.assert_close(found, theirs["found"], rtol=0, atol=1e-5)


def test_units_do_not_matter() -> None:
    W, format = torch.randn(5, 96), fb.Int(3, block=32, symmetric=False)
    assert torch.equal(HQQ()(1024 * W, format, {}).codes(), HQQ()(W, format, {}).codes())


def test_settings_are_checked() -> None:
    for setting in ({"p": 0.0}, {"beta": 0.0}, {"kappa": 0.5}, {"steps": -1}):
        with pytest.raises(ValueError, match="HQQ needs"):
            HQQ(**setting)
