"""Laws of a number format."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import finebits as fb
from finebits import kernels
from finebits.blocks import spread, unpack
from finebits.formats.base import Format, Scales
from finebits.qtensor import QTensor
from variants import BLOCKS, formats, methods

every = pytest.mark.parametrize("format", formats(), ids=str)
drawn = st.sampled_from(formats(BLOCKS))


def by_fit(W: torch.Tensor, format: Format) -> tuple[torch.Tensor, Scales]:
    scales = format.scales(format.fit(W))
    return format.encode(W, scales), scales


def test_folder_is_not_empty() -> None:
    assert methods("formats")


@every
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_every_code_survives_decoding_and_encoding(format: Format, size: float) -> None:
    codes = torch.arange(2**format.bits, dtype=torch.uint8).repeat(3, 1)
    scales = format.scales(format.fit(size * torch.randn(3, codes.shape[-1])))
    W = format.decode(codes, scales)
    again = format.decode(format.encode(W, scales), scales)
    if scales.shift is None:
        assert torch.equal(again, W)
    else:
        torch.testing.assert_close(again, W, rtol=0, atol=1e-6 * float(W.abs().max()))
        assert torch.equal(format.encode(again, scales), format.encode(W, scales))


@given(drawn, st.integers(1, 5), st.integers(1, 150), st.integers(0, 99))
def test_encode_is_nearest(format: Format, m: int, n: int, seed: int) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    codes, scales = by_fit(W, format)
    levels = torch.tensor(format.levels())[:, None, None] * spread(scales.scale.float(), format.block, n)
    if scales.shift is not None:
        levels = levels + spread(scales.shift.float(), format.block, n)
    nearest = (levels - W).abs().amin(0)
    got = (format.decode(codes, scales) - W).abs()
    assert (got <= nearest + 1e-6 * W.abs().max()).all()


@given(drawn, st.integers(1, 9), st.integers(1, 300), st.integers(1, 3))
def test_price_is_what_is_held(format: Format, m: int, n: int, e: int) -> None:
    assert format.storage_bits(m, n) == 8 * fb.quantize(torch.randn(m, n), format).nbytes
    assert e * format.storage_bits(m, n) == 8 * fb.quantize(torch.randn(e, m, n), format).nbytes


@given(drawn, st.integers(1, 5), st.integers(1, 150), st.integers(0, 99))
def test_fused_rounding_is_fit_and_encode(format: Format, m: int, n: int, seed: int) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    codes, scales = by_fit(W, format)
    rounding = format.rounding(W.device)
    assert torch.equal(fb.quantize(W, format).dequantize(), format.decode(codes, scales))
    if rounding is None:  # its scales are found or held in another way
        return
    packed, scale, shift = kernels.quantize(W, rounding)
    assert torch.equal(unpack(packed, format.bits, n), codes)
    assert torch.equal(scale, scales.scale) and scale.dtype == scales.scale.dtype
    assert (shift is None) == (scales.shift is None)
    if shift is not None:
        assert torch.equal(shift, scales.shift)


@every
@pytest.mark.parametrize("k", [-3, 4])
def test_a_power_of_two_passes_through(format: Format, k: int) -> None:
    W = torch.randn(5, 77)
    small, large = fb.quantize(W, format), fb.quantize(2.0**k * W, format)
    assert torch.equal(large.codes(), small.codes())
    assert torch.equal(large.dequantize(), 2.0**k * small.dequantize())


@every
def test_a_block_of_zeros_stays_zero(format: Format) -> None:
    W = torch.randn(4, 130)
    W[:, 64:128] = 0
    assert torch.equal(fb.quantize(W, format).dequantize()[:, 64:128], torch.zeros(4, 64))


@every
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_constant_block_stays_constant(format: Format, sign: float) -> None:
    w = fb.quantize(torch.full((2, 64), sign * 0.75), format).dequantize()
    assert (w == w[0, 0]).all()
    assert sign * w[0, 0] >= 0 and torch.isfinite(w).all()


@given(drawn, st.integers(1, 4), st.integers(1, 3), st.integers(1, 63))
def test_a_short_last_block_stands_alone(format: Format, m: int, whole: int, rest: int) -> None:
    if format.shared:  # what a whole matrix shares sees all of its columns
        return
    n = whole * format.block if format.block < 1000 else 0
    W = torch.randn(m, n + min(rest, format.block))
    assert torch.equal(fb.quantize(W, format).dequantize()[:, n:], fb.quantize(W[:, n:], format).dequantize())


@every
def test_experts_are_quantized_one_by_one(format: Format) -> None:
    W = torch.randn(3, 4, 70)
    q = fb.quantize(W, format)
    assert q.shape == W.shape
    for e in range(3):
        assert torch.equal(q.dequantize()[e], fb.quantize(W[e], format).dequantize())


@every
def test_codes_packed_again_are_the_same_weight(format: Format) -> None:
    q = fb.quantize(torch.randn(3, 75), format)
    parts = {k: v for k, v in q.parts.items() if k != "codes"}
    again = QTensor.from_codes(q.codes(), parts, format)
    assert torch.equal(again.parts["codes"], q.parts["codes"]) and torch.equal(again.dequantize(), q.dequantize())


@every
def test_more_bits_never_hurt(format: Format) -> None:
    W = torch.randn(32, 256)
    wider = [type(format)(**vars(format) | {"bits": b}) for b in format.widths if b > format.bits]
    error = (fb.quantize(W, format).dequantize() - W).norm()
    assert all((fb.quantize(W, f).dequantize() - W).norm() <= error for f in wider)


@every
def test_tiny_and_subnormal_weights_stay_finite_and_small(format: Format) -> None:
    for size in (1e-30, 1e-38, 1e-42):
        W = size * torch.randn(2, 70)
        w = fb.quantize(W, format).dequantize()
        assert torch.isfinite(w).all() and (w.abs() <= 2 * W.abs().max() + 1e-7).all()


@pytest.mark.parametrize("cls", methods("formats"))
@pytest.mark.parametrize("bad", [{"bits": 9}, {"bits": 0}, {"block": 15}, {"block": 4097}, {"scale": "fp8"}], ids=str)
def test_a_setting_that_it_has_not_is_refused(cls: type, bad: dict) -> None:
    if not bad.keys() <= {f.name for f in dataclasses.fields(cls)}:
        pytest.skip("fixed for good")
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        cls(**bad)


@pytest.mark.parametrize("format", [f for f in formats(scale=("fp16",)) if f.scale == "fp16"], ids=str)
def test_a_scale_that_does_not_fit_its_store_is_refused(format: Format) -> None:
    W = torch.randn(2, 64)
    W[1] *= 1e8
    with pytest.raises(ValueError, match="fp16"):
        fb.quantize(W, format)
    with pytest.raises(ValueError, match="fp16"):
        format.fit(W)
