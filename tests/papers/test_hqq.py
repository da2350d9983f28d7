"""HQQ: sparse errors, without data."""

from __future__ import annotations

import numpy as np
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


@pytest.mark.parametrize("steps", [1, 6])
def test_the_authors_alternation_in_double_precision(steps: int) -> None:
    """Theirs: q = clip(round(w·s + z)), ŵ = (q − z)/s, W_e = sign(x)·relu(|x| − |x|^(p−1)/β), z = mean(q − (w − W_e)·s), β ← κβ. Blocks whose
    scale is one, so that their units are ours; the best iterate of each block is kept."""
    torch.manual_seed(5)
    W = torch.rand(6, 16) * 1.6 + 0.3
    W[:, 0], W[:, 1] = -1.0, 2.0  # the range is 3: four levels, one apart
    w, beta, p, kappa, s, z = W.double().numpy(), 10.0, 0.7, 1.01, 1.0, np.full((6, 1), 1.0)
    best, kept = np.full((6, 1), np.inf), np.zeros_like(w)
    for _ in range(steps + 1):
        q = np.clip(np.round(w * s + z), 0, 3)
        hat = (q - z) / s
        loss = np.abs(w - hat).sum(1, keepdims=True)
        kept, best = np.where(loss < best, hat, kept), np.minimum(loss, best)
        x = w - hat
        We = np.sign(x) * np.maximum(np.abs(x) - np.maximum(np.abs(x), 1e-12) ** (p - 1) / beta, 0)
        z = (q - (w - We) * s).mean(1, keepdims=True)
        beta *= kappa
    assert best.sum() < np.abs(w - (np.clip(np.round(w + 1), 0, 3) - 1)).sum()
    found = HQQ(steps=steps)(W, fb.Int(2, block=16, symmetric=False), {}).dequantize().double().numpy()
    np.testing.assert_allclose(found, kept, rtol=0, atol=1e-5)


def test_units_do_not_matter() -> None:
    W, format = torch.randn(5, 96), fb.Int(3, block=32, symmetric=False)
    assert torch.equal(HQQ()(1024 * W, format, {}).codes(), HQQ()(W, format, {}).codes())


def test_settings_are_checked() -> None:
    for setting in ({"p": 0.0}, {"beta": 0.0}, {"kappa": 0.5}, {"steps": -1}):
        with pytest.raises(ValueError, match="HQQ needs"):
            HQQ(**setting)
