"""MXFP4: the gguf package, which writes the same blocks, finds the same exponents and values."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.mxfp4 import MXFP4


def test_shared_exponent_by_hand() -> None:
    W = torch.zeros(4, 32)
    W[0, 0], W[1, 0], W[2, 0] = 4.0, 7.9, -8.0
    q = fb.quantize(W, MXFP4())
    assert q.parts["scale"][:3, 0].tolist() == [127, 127, 128] and q.parts["scale"].dtype == torch.uint8
    assert q.dequantize()[:3, 0].tolist() == [4.0, 6.0, -8.0]
    assert torch.equal(q.dequantize()[3], torch.zeros(32))


def test_four_and_a_quarter_bits() -> None:
    assert MXFP4().storage_bits(4, 64) == 4 * 64 * 4.25


def test_gguf_reads_the_same_weight() -> None:
    gguf = pytest.importorskip("gguf")
    from gguf.quants import dequantize

    if not hasattr(gguf.GGMLQuantizationType, "MXFP4"):
        pytest.skip("this gguf has no MXFP4")
    q = fb.quantize(torch.randn(3, 96) * torch.tensor([[1e-3], [1.0], [50.0]]), MXFP4())
    codes = q.codes().unflatten(-1, (-1, 32))
    blocks = torch.cat([q.parts["scale"][..., None], codes[..., :16] | codes[..., 16:] << 4], -1).flatten(-2)
    assert torch.equal(torch.from_numpy(dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4)), q.dequantize())
