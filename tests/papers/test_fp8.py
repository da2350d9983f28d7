"""FP8: torch's own types have the same values and round the same way."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.fp8 import FP8

TYPES = {"e4m3": (torch.float8_e4m3fn, 448.0, 2.0**8), "e5m2": (torch.float8_e5m2, 57344.0, 2.0**15)}
each = pytest.mark.parametrize("variant", TYPES)


@each
def test_values_of_all_codes(variant: str) -> None:
    dtype, top, unit = TYPES[variant]
    torchs = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    ours = torch.tensor(FP8(variant=variant).levels()) * unit
    finite = torchs.isfinite()
    assert torch.equal(ours[finite], torchs[finite]) and ours.abs().max() == top
    assert (ours[~finite].abs() == top).all()


@each
def test_rounding_is_the_cast_but_for_ties(variant: str) -> None:
    dtype, top, unit = TYPES[variant]
    W = torch.randn(4, 256) * torch.randn(4, 256).mul(3).exp()
    W[:, ::64] = top
    W.clamp_(-top, top)
    w = fb.quantize(W, FP8(64, variant)).dequantize()
    cast = W.to(dtype).float()
    assert torch.equal((w - W).abs(), (cast - W).abs()) and (w == cast).float().mean() > 0.99
