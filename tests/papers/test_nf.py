"""QLoRA's NormalFloat (arXiv:2305.14314): the published table, the construction, the storage."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.nf import NF4, normal_float
from golden.values import golden

PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_is_the_published_table_and_the_construction() -> None:
    assert list(NF4) == PUBLISHED == list(fb.NF(4).levels())
    assert normal_float(4) == pytest.approx(PUBLISHED, abs=1e-6)


def test_all_widths_follow_the_same_construction() -> None:
    """As LoftQ's authors make them."""
    for name, levels in golden("normal_float").items():
        assert normal_float(int(name[2:])) == pytest.approx(levels[0].tolist(), abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_ascend_with_zero_once_and_one_more_above(bits: int) -> None:
    levels = normal_float(bits)
    assert len(levels) == 2**bits and sorted(set(levels)) == list(levels)
    assert levels.count(0.0) == 1 and levels[0] == -1.0 and levels[-1] == 1.0
    assert sum(v > 0 for v in levels) == 2 ** (bits - 1) == sum(v < 0 for v in levels) + 1


def test_error_is_at_most_half_the_widest_gap() -> None:
    W = torch.randn(64, 256)
    q = fb.quantize(W, fb.NF(4, block=64))
    bound = q.parts["scale"].repeat_interleave(64, 1) * 0.3038 / 2
    assert ((q.dequantize() - W).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize(("bits", "expected"), [(4, 0.0921), (3, 0.2005)])
def test_relative_error_of_a_gaussian(bits: int, expected: float) -> None:
    W = torch.randn(256, 256)
    error = (fb.quantize(W, fb.NF(bits, block=64)).dequantize() - W).norm() / W.norm()
    assert float(error) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("block", "expected"), [(16, 0.0811), (64, 0.0923), (256, 0.0991)])
def test_nf4_is_worse_than_affine_integers_at_small_blocks_and_better_at_large(block: int, expected: float) -> None:
    W = torch.randn(256, 512)
    error = lambda f: float((fb.quantize(W, f).dequantize() - W).norm() / W.norm())  # noqa: E731
    nf, integer = error(fb.NF(4, block=block)), error(fb.Int(4, block=block, symmetric=False))
    assert nf == pytest.approx(expected, rel=0.02)
    assert (nf < integer) == (block > 64)


def test_known_weights_known_bytes() -> None:
    """Five weights at 4 bits in three bytes: low nibble first, the last nibble is padding."""
    W = torch.tensor([[1.0, -1.0, 0.0, 0.5626, -0.6962]])
    q = fb.quantize(W, fb.NF(4))
    assert q.parts["codes"].tolist() == [[15 | 0 << 4, 7 | 13 << 4, 1]]
    q = fb.quantize(W, fb.NF(3))
    assert q.codes().tolist() == [[7, 0, 3, 6, 1]]
    assert q.parts["codes"].tolist() == [[0b10_11_00_11, 0b01, 0b0_1_0_0_1]]


def test_bits_per_weight_at_block_64() -> None:
    assert fb.NF(4, block=64).storage_bits(4096, 4096) == 4.5 * 4096**2
    assert fb.NF(4, block=64, scale="bf16").storage_bits(4096, 4096) == 4.25 * 4096**2
    assert fb.NF(3, block=64, scale="bf16").storage_bits(4096, 4096) == 3.25 * 4096**2
