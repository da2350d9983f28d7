"""The gguf package itself reads what we write, and we read what it writes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

import finebits as fb
from finebits.formats.ternary import Ternary
from finebits.layouts.gguf import DENSE, FORMATS, from_gguf, rounded, size, to_gguf
from finebits.layouts.kquants import KINDS

gguf = pytest.importorskip("gguf")
from gguf.quants import dequantize, quantize  # noqa: E402

TYPES = [gguf.GGMLQuantizationType[k] for k in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]
each = pytest.mark.parametrize("kind", TYPES, ids=lambda k: k.name)


@each
def test_its_tensor_is_read_and_written_again_bit_by_bit(kind: object) -> None:
    W = torch.randn(5, 160)
    W[0, :32], W[1, 3] = 0, 40.0
    data = quantize(W.numpy(), kind)
    q = from_gguf(data, kind.name)
    assert q.shape == (5, 160)
    assert np.array_equal(q.dequantize().numpy(), dequantize(data, kind))
    again, found = to_gguf(q)
    assert found == kind.name and np.array_equal(again, data)
    assert again.nbytes == q.nbytes


@each
def test_any_bytes_are_read_and_written_again(kind: object) -> None:
    data = quantize(torch.randn(4, 64).numpy(), kind)
    head = 4 if kind.name.endswith("_1") else 2
    blocks = data.reshape(4, 2, -1).copy()
    blocks[..., head:] = np.random.default_rng(0).integers(0, 256, blocks[..., head:].shape, dtype=np.uint8)
    data = blocks.reshape(4, -1)
    q = from_gguf(data, kind.name)
    assert np.array_equal(q.dequantize().numpy(), dequantize(data, kind))
    assert np.array_equal(to_gguf(q)[0], data)


FITS = [
    (fb.Int(4, 32, True, "fp16"), "Q4_0"),
    (fb.Int(4, 32, True, "fp16", "full"), "Q4_0"),
    (fb.Int(4, 64, True, "fp16"), "Q4_0"),
    (fb.Int(3, 32, True, "fp16"), "Q4_0"),
    (fb.Int(4, 32, True, "pow2"), "Q4_0"),
    (Ternary(64, "fp16"), "Q4_0"),
    (fb.Int(4, 32, False, "fp16"), "Q4_1"),
    (fb.Int(2, 128, False, "fp16"), "Q4_1"),
    (fb.Int(5, 32, True, "fp16", "full"), "Q5_0"),
    (fb.Int(5, 64, False, "fp16"), "Q5_1"),
    (fb.Int(8, 32, True, "fp16"), "Q8_0"),
    (fb.Int(6, 32, True, "fp16", "full"), "Q8_0"),
]


@pytest.mark.parametrize("format,name", FITS, ids=str)
def test_what_fits_is_written_exactly(format: object, name: str) -> None:
    q = fb.quantize(torch.randn(3, 256), format)
    data, kind = to_gguf(q)
    assert kind == name
    assert np.array_equal(dequantize(data, gguf.GGMLQuantizationType[kind]), q.dequantize().numpy())
    assert torch.equal(from_gguf(data, kind).dequantize(), q.dequantize())


@pytest.mark.parametrize(
    "format,n,reason",
    [
        (fb.Int(4, 32), 64, "rounded"),
        (fb.Int(4, 48, True, "fp16"), 96, "blocks of 32"),
        (fb.Int(4, 32, True, "fp16"), 48, "blocks of 32"),
        (fb.NF(4, 32, "fp16"), 64, "integers"),
        (fb.Int(8, 32, False, "fp16"), 64, "integers"),
    ],
    ids=str,
)
def test_what_would_be_rounded_is_refused(format: object, n: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        to_gguf(fb.quantize(torch.randn(2, n), format))


def test_other_types_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Q6_K"):
        from_gguf(np.zeros((1, 210), np.uint8), "Q6_K")


def test_experts_and_negative_scales() -> None:
    W = -torch.rand(2, 3, 32)
    data = quantize(-W.reshape(6, 32).numpy(), TYPES[0]).reshape(2, 3, -1)  # positive weights: GGUF's d is negative
    q = from_gguf(data, "Q4_0")
    assert (q.parts["scale"] < 0).all() and q.shape == (2, 3, 32)
    w = q.dequantize()
    assert torch.equal(q.format.decode(q.format.encode(w, q.format.scales(q.parts)), q.format.scales(q.parts)), w)


# Σ(ŵ − w)² / Σw² of ggml_quantize_chunk (ggml 0.25.3) over the matrix of the test below
GGML = {"Q4_0": 0.012973, "Q4_1": 0.008994, "Q5_0": 0.003602, "Q5_1": 0.002073, "Q8_0": 0.0000589}


@pytest.mark.parametrize("kind", GGML)
def test_a_dense_weight_is_rounded_with_less_error_than_ggml_leaves(kind: str) -> None:
    W = torch.from_numpy(0.02 * np.random.RandomState(0).standard_t(4, (64, 256))).float()
    back = torch.from_numpy(dequantize(rounded(W, kind), gguf.GGMLQuantizationType[kind]))
    assert float((back - W).square().sum() / W.square().sum()) < GGML[kind]


@pytest.mark.parametrize("kind", [*DENSE, *FORMATS, *KINDS])
def test_sizes_are_ggufs(kind: str) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert size(kind, 512) == 512 // block * nbytes and rounded(torch.randn(2, 3, 512), kind).shape == (2, 3, size(kind, 512))
    with pytest.raises(ValueError, match=f"blocks of {block}") if block > 1 else contextlib.nullcontext():
        rounded(torch.randn(2, 48), kind)


def test_a_weight_that_float16_has_no_number_for_is_refused() -> None:
    with pytest.raises(ValueError, match="up to 65504, and a weight is 70000: take bf16"):
        rounded(torch.full((1, 32), 7e4), "F16")
