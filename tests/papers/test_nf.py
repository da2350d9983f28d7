"""NormalFloat: the published tables and the bounds that follow from them."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.nf import NF4, normal_float

PUBLISHED = {
    2: (-1, 0, 0.33792, 1),
    3: (-1, -0.47863, -0.21714, 0, 0.16093, 0.33792, 0.56262, 1),
}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_published_values(bits: int) -> None:
    assert fb.NF(bits).levels() == pytest.approx(PUBLISHED[bits], abs=1e-5)


def test_construction_gives_the_published_table_of_four_bits() -> None:
    assert normal_float(4) == pytest.approx(NF4, abs=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_shape_of_every_table(bits: int) -> None:
    levels = fb.NF(bits).levels()
    assert len(levels) == 2**bits and list(levels) == sorted(set(levels))
    assert levels[0] == -1 and levels[-1] == 1 and levels[2 ** (bits - 1) - 1] == 0


def test_error_is_at_most_half_the_largest_gap() -> None:
    W = torch.randn(16, 256)
    error = (fb.quantize(W, fb.NF(4, 64)).dequantize() - W).abs().unflatten(-1, (-1, 64)).amax(-1)
    gap = max(b - a for a, b in zip(NF4, NF4[1:], strict=False))
    assert gap == pytest.approx(0.3038, abs=1e-4)
    assert (error <= W.unflatten(-1, (-1, 64)).abs().amax(-1) * gap / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    "block,nf,affine", [(16, 0.0811, 0.0695), (32, 0.0876, 0.0809), (64, 0.0923, 0.0913), (128, 0.0960, 0.1008), (256, 0.0991, 0.1099)]
)
def test_integers_win_below_blocks_of_64(block: int, nf: float, affine: float) -> None:
    W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    integer = fb.Int(4, block, False, variant="integer")
    error = {f: float((fb.quantize(W, f).dequantize() - W).norm() / W.norm()) for f in (fb.NF(4, block), integer)}
    assert error[fb.NF(4, block)] == pytest.approx(nf, rel=0.015)
    assert error[integer] == pytest.approx(affine, rel=0.015)
