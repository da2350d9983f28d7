"""Ternary weights: equations 1 to 3."""

from __future__ import annotations

import torch

import finebits as fb
from finebits.formats.ternary import Ternary


def test_equations() -> None:
    W = torch.randn(7, 90)
    q = fb.quantize(W, Ternary("tensor"))
    g = W.abs().mean()
    torch.testing.assert_close(q.parts["scale"], g[None])
    torch.testing.assert_close(q.dequantize(), g * (W / g).round().clamp(-1, 1))
    assert q.codes().max() <= 2


def test_a_short_block_has_its_own_mean() -> None:
    W = torch.randn(3, 70)
    q = fb.quantize(W, Ternary(64))
    torch.testing.assert_close(q.parts["scale"][:, 1], W[:, 64:].abs().mean(-1))
