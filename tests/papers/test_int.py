"""Uniform integers: the four grids."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats._stores import Double

W = torch.randn(9, 100, generator=torch.Generator().manual_seed(1))


def test_what_follows_from_symmetric() -> None:
    assert fb.Int(4).form == "restricted" and fb.Int(4, symmetric=False).form == "real"
    assert fb.Int(4) == fb.Int(4, variant="restricted")
    with pytest.raises(ValueError, match="real and integer"):
        fb.Int(4, symmetric=False, variant="full")
    with pytest.raises(ValueError, match="variant='integer'"):
        fb.Int(4, symmetric=False, scale="pow2")


@pytest.mark.parametrize("bits", range(2, 9))
def test_grids(bits: int) -> None:
    half = 2 ** (bits - 1)
    assert set(fb.Int(bits).levels()) == set(range(1 - half, half))
    assert fb.Int(bits, variant="full").levels() == tuple(range(-half, half))
    for variant in ("real", "integer"):
        assert fb.Int(bits, symmetric=False, variant=variant).levels() == tuple(range(2 * half))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", ["fp32", "fp16", "pow2", "double", Double(4, 16, "zero")])
def test_an_integer_zero_point_keeps_zero(bits: int, scale: object) -> None:
    V = W + 0.5
    V[:, ::7] = 0
    q = fb.quantize(V, fb.Int(bits, 32, False, scale, "integer"))
    assert q.parts["zero"].dtype == torch.uint8 and q.parts["zero"].max() <= 2**bits - 1
    assert torch.equal(q.dequantize()[:, ::7], torch.zeros_like(V[:, ::7]))


def test_a_real_minimum_is_met_and_an_integer_zero_is_within_a_step() -> None:
    q = fb.quantize(W, fb.Int(4, 100, False))
    torch.testing.assert_close(q.dequantize().amin(-1), W.amin(-1))
    q = fb.quantize(W, fb.Int(4, 100, False, variant="integer"))
    assert ((q.dequantize() - W).abs().amax(-1) <= 1.01 * q.parts["scale"].amax(-1)).all()


def test_the_full_range_uses_its_lowest_code_and_helps_at_two_bits() -> None:
    full, restricted = (fb.quantize(W, fb.Int(2, 50, variant=v)) for v in ("full", "restricted"))
    assert full.codes().min() == 0 and full.codes().max() == 3 and restricted.codes().max() == 2
    assert (full.dequantize() - W).norm() < 0.8 * (restricted.dequantize() - W).norm()


def test_codes_chosen_under_a_negative_scale() -> None:
    format = fb.Int(4, 50, variant="full")
    q = fb.quantize(W, format)
    minus = format.scales({"scale": -q.parts["scale"]})
    assert torch.equal(format.decode(format.encode(-W, minus), minus), -q.dequantize())


def test_one_scale_a_row_and_one_a_matrix() -> None:
    row, whole = fb.quantize(W, fb.Int(8, "row")), fb.quantize(W, fb.Int(8, "tensor"))
    assert row.parts["scale"].shape == (9, 1) and whole.parts["scale"].shape == (1,)
    torch.testing.assert_close(row.parts["scale"], W.abs().amax(-1, keepdim=True) / 127)
    torch.testing.assert_close(whole.parts["scale"], W.abs().amax()[None] / 127)
    assert 8 * whole.nbytes == fb.Int(8, "tensor").storage_bits(9, 100) == 9 * 100 * 8 + 32
    assert torch.equal(whole[2:5].dequantize(), whole.dequantize()[2:5]) and whole[2:5].parts["scale"].shape == (1,)
