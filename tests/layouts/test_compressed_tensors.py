"""The compressed-tensors package itself decompresses what we write, and we read what it compresses."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.int import Int
from finebits.layouts.compressed_tensors import from_compressed, to_compressed, weights_scheme

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import PackedQuantizationCompressor as Packed  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402

FORMATS = [
    Int(b, block, symmetric, scale, variant)
    for b in (2, 3, 4, 8)
    for block in (32, "row")
    for scale in ("bf16", "fp16", "fp32")
    for symmetric, variant in ((True, "full"), (False, "integer"))
]


def scheme(format: Int) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights_scheme(format)))


@pytest.mark.parametrize("format", [*FORMATS, Int(4, 64, True, "bf16"), Int(8, 64, True, "fp16")], ids=str)
def test_it_reads_what_we_write(format: Int) -> None:
    q = fb.quantize(torch.randn(7, 192), format)
    tensors = to_compressed(q)
    W = Packed.decompress(tensors, scheme(format))["weight"]
    own = q.dequantize().to(W.dtype)
    if format.scale == "fp32" and not format.symmetric:
        torch.testing.assert_close(W, own, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(W, own)
    back = from_compressed(tensors, weights_scheme(format))
    assert torch.equal(back.dequantize(torch.float32), q.dequantize(torch.float32))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_we_read_what_it_writes_and_write_it_again(format: Int) -> None:
    q = fb.quantize(torch.randn(6, 96), format)
    scale = q.parts["scale"]
    state = {"weight": torch.randn(6, 96).to(scale.dtype), "weight_scale": scale}
    if not format.symmetric:
        state["weight_zero_point"] = (q.parts["zero"].int() - 2 ** (format.bits - 1)).to(torch.int8)
    packed = Packed.compress(state, scheme(format))
    read = from_compressed(packed, weights_scheme(format))
    assert read.format == format
    again = to_compressed(read)
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[k], packed[k]) and again[k].dtype == packed[k].dtype for k in packed)


@pytest.mark.parametrize(
    "format,reason",
    [
        (fb.NF(4, 64), "Int"),
        (Int(5, 64), "Int"),
        (Int(4, 64, False), "real minima"),
        (Int(4, 64, scale="pow2"), "plain"),
        (Int(4, "tensor"), "plain"),
    ],
    ids=str,
)
def test_what_it_has_not_is_refused(format: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        to_compressed(fb.quantize(torch.randn(2, 128), format))


def test_short_groups_and_activation_order_are_refused() -> None:
    with pytest.raises(ValueError, match="whole groups"):
        to_compressed(fb.quantize(torch.randn(2, 100), Int(4, 64)))
    tensors = to_compressed(fb.quantize(torch.randn(2, 64), Int(4, 32))) | {"weight_g_idx": torch.tensor([1, 0] * 32)}
    with pytest.raises(ValueError, match="activation order"):
        from_compressed(tensors, weights_scheme(Int(4, 32)))
