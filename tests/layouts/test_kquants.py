"""The gguf package reads our super-blocks as we do, any bytes are kept, and the search leaves less error than ggml's own quantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finebits.layouts.kquants import KINDS, decode, from_bytes, to_bytes
from finebits.layouts.ksearch import encode, found

gguf = pytest.importorskip("gguf")
from gguf.quants import dequantize  # noqa: E402

STEPS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where float16 numbers lie
each = pytest.mark.parametrize("kind", KINDS)


@each
def test_any_bytes_are_read_as_gguf_reads_them_and_written_again(kind: str) -> None:
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (64, KINDS[kind].size), dtype=np.uint8)
    for at in STEPS[kind]:
        data[:, at : at + 2] = random.normal(size=(64, 1)).astype(np.float16).view(np.uint8)
    assert np.array_equal(decode(data, kind).numpy(), dequantize(data, gguf.GGMLQuantizationType[kind]))
    assert np.array_equal(to_bytes(from_bytes(torch.from_numpy(data), kind), kind).numpy(), data)


@each
def test_what_is_written_is_what_was_found(kind: str) -> None:
    W = torch.randn(5, 512)
    data = encode(W, kind)
    assert data.shape == (5, 2 * KINDS[kind].size) and gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (256, KINDS[kind].size)
    x = W.reshape(10, -1, KINDS[kind].group)
    assert torch.equal(decode(data, kind), found(x, torch.ones_like(x), KINDS[kind]).values().reshape(5, 512))
    experts = encode(torch.stack([W, 2 * W]), kind)
    assert np.array_equal(experts[0], data) and decode(experts, kind).shape == (2, 5, 512)


@each
def test_what_it_holds_is_found_again(kind: str) -> None:
    """A weight that was read once more is the same weight, to a float16 number's rounding."""
    W = decode(encode(torch.randn(4, 256), kind), kind)
    again = decode(encode(W, kind), kind)
    assert float((again - W).square().sum() / W.square().sum()) < 2e-4


# Σ(ŵ − w)² / Σw² of ggml_quantize_chunk (llama.cpp of November 2026, ggml 0.25.3): plain, and Σd(ŵ − w)² / Σdw² with d as its importance
# matrix, over the same two matrices
GGML = {
    "Q2_K": ((0.089364, 0.047613), (0.118202, 0.062752)),
    "Q3_K": ((0.022892, 0.016299), (0.033642, 0.026632)),
    "Q4_K": ((0.005116, 0.003635), (0.007685, 0.005749)),
    "Q5_K": ((0.001315, 0.000968), (0.001957, 0.001574)),
    "Q6_K": ((0.000322, 0.000245), (0.000538, 0.000443)),
}


def matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal weights, weights with long tails, and an importance of columns; from numpy, whose stream no version changes."""
    random = np.random.RandomState(0)
    normal, tailed = random.standard_normal((64, 512)), random.standard_t(4, (64, 512))
    return (
        torch.from_numpy(0.02 * normal).float(),
        torch.from_numpy(0.02 * tailed).float(),
        torch.from_numpy(random.lognormal(0, 1.5, 512)).float(),
    )


@each
def test_less_error_than_ggml_leaves(kind: str) -> None:
    normal, tailed, d = matrices()
    for W, (plain, weighted) in zip((normal, tailed), GGML[kind], strict=True):
        for weight, theirs in ((None, plain), (d, weighted)):
            error = (decode(encode(W, kind, weight), kind) - W).square() * (1 if weight is None else weight)
            assert float(error.sum() / (W.square() * (1 if weight is None else weight)).sum()) < theirs


@each
def test_zeros_and_constants_and_tiny_and_large_weights(kind: str) -> None:
    W = torch.zeros(4, 256)
    W[1], W[2], W[3] = -0.75, 1e-9, 3e4 * torch.randn(256)
    back = decode(encode(W, kind), kind)
    assert bool(torch.isfinite(back).all()) and torch.equal(back[0], W[0])
    torch.testing.assert_close(back[1], W[1], rtol=2e-3, atol=0)
    assert float(back[2].abs().max()) <= 2e-9 and float((back[3] - W[3]).norm() / W[3].norm()) < 0.4


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="super-blocks of 256, and rows of this weight are 96: take a type with blocks of 32"):
        encode(torch.ones(2, 96), "Q4_K")
    with pytest.raises(ValueError, match="holds nan at"):
        encode(torch.full((1, 256), torch.nan), "Q6_K")
    with pytest.raises(ValueError, match="this tensor is IQ4_NL"):
        decode(np.zeros((1, 18), np.uint8), "IQ4_NL")
