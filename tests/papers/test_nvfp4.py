"""NVFP4: two levels of scales."""

from __future__ import annotations

import torch

import finebits as fb
from finebits.formats.fp4 import FP4
from finebits.formats.mxfp4 import MXFP4
from finebits.formats.nvfp4 import NVFP4

W = torch.randn(6, 160, generator=torch.Generator().manual_seed(0)) * 0.02


def test_the_largest_weight_is_met() -> None:
    q = fb.quantize(W, NVFP4())
    at = W.abs().argmax()
    torch.testing.assert_close(q.dequantize().flatten()[at], W.flatten()[at])
    assert q.parts["scale"].max() == 0x7E  # 448 in E4M3
    torch.testing.assert_close(q.parts["scale_top"], W.abs().max()[None] / (6 * 448))


def test_value_by_its_parts() -> None:
    q = fb.quantize(W, NVFP4())
    micro = q.parts["scale"].view(torch.float8_e4m3fn).float()
    level = torch.tensor(NVFP4().levels())[q.codes().long()]
    assert torch.equal(q.dequantize(), level * (micro * q.parts["scale_top"]).repeat_interleave(16, -1))


def test_four_and_a_half_bits_and_one_float() -> None:
    assert NVFP4().storage_bits(6, 160) == 6 * 160 * 4.5 + 32 == 8 * fb.quantize(W, NVFP4()).nbytes


def test_finer_scales_are_better_than_powers_of_two_and_near_free_ones() -> None:
    error = {f: float((fb.quantize(W, f).dequantize() - W).norm()) for f in (NVFP4(), MXFP4(), FP4(16))}
    assert error[FP4(16)] <= 1.01 * error[NVFP4()] and error[NVFP4()] < 0.9 * error[MXFP4()]


def test_rows_and_experts_keep_their_scale() -> None:
    q = fb.quantize(torch.stack([W, 100 * W]), NVFP4())
    assert q.parts["scale_top"].shape == (2, 1)
    assert torch.equal(q[1].dequantize(), fb.quantize(100 * W, NVFP4()).dequantize())
    assert torch.equal(q[0][2:4].dequantize(), q.dequantize()[0, 2:4]) and q[0][2:4].parts["scale_top"].shape == (1,)
