"""LDLQ: equal to GPTQ under the same scales; passes only descend."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.linalg import damped_cholesky
from finebits.quantizers._family import plain
from finebits.quantizers.gptq import GPTQ
from finebits.quantizers.ldlq import LDLQ
from finebits.stats.gram import Gram
from papers.gram import inputs, output_error, seen

FORMATS = [fb.NF(3, block="row"), fb.NF(2, block=4096), fb.VQ(M=1, K=16, g=2)]


def test_the_factors() -> None:
    R = seen(inputs(90, 23), None, Gram)[Gram].value()
    M = damped_cholesky(R.flip(0, 1), 0.01).flip(0, 1)
    assert torch.equal(M, M.triu())
    torch.testing.assert_close(M @ M.mT, R + 0.01 * R.diagonal().mean() * torch.eye(23), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_theorem_6_it_is_gptq(format: fb.NF) -> None:
    """Both round against scales of the untouched rows here: blocks as long as a row, or books."""
    W, stats = torch.randn(11, 74), seen(inputs(200, 74), None, Gram)
    one, other = LDLQ(passes=0, lazy=30)(W, format, stats), GPTQ()(W, format, stats)
    assert (one.codes() == other.codes()).float().mean() > 0.995


def test_passes_never_lose() -> None:
    W, format = torch.randn(9, 77), fb.NF(2, block=16)
    stats = seen(inputs(300, 77), None, Gram)
    R = stats[Gram].value()
    H = R + 0.01 * R.diagonal().mean() * torch.eye(77)
    losses = [output_error(LDLQ(passes=p, lazy=20)(W, format, stats).dequantize(), W, H) for p in (0, 1, 2, 8)]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < losses[0]
    assert losses[0] < 0.7 * output_error(plain(W, format).dequantize(), W, H)


def test_no_pass_can_improve_a_finished_one() -> None:
    """Coordinate descent ends where every column is the nearest to its target."""
    W, format = torch.randn(5, 40), fb.Int(3, block=16)
    stats = seen(inputs(100, 40), None, Gram)
    assert torch.equal(LDLQ(passes=50)(W, format, stats).codes(), LDLQ(passes=51)(W, format, stats).codes())


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="passes"):
        LDLQ(passes=-1)
    with pytest.raises(ValueError, match="damp"):
        LDLQ(damp=-0.5)
