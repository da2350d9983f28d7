"""Powers of two and of √2."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.log2 import Log2


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("root", [1, 2])
def test_values_are_powers(bits: int, root: int) -> None:
    format = Log2(bits, root=root, signed=False)
    powers = [2.0 ** (-k / root) for k in range(2**bits - 1)]
    assert format.levels() == pytest.approx((*powers, 0.0), rel=1e-12)
    assert format.levels()[:: 2 * root - 1 or 1][0] == 1.0


def test_even_powers_of_root_two_are_exact() -> None:
    assert Log2(4, root=2, signed=False).levels()[:14:2] == tuple(2.0**-k for k in range(7))


@pytest.mark.parametrize("std,uniform,log2,root2", [(1, 0.250, 0.202, 0.102), (2, 0.192, 0.206, 0.100), (4, 0.072, 0.180, 0.097)])
def test_after_a_softmax(std: float, uniform: float, log2: float, root2: float) -> None:
    X = torch.softmax(std * torch.randn(256, 64, generator=torch.Generator().manual_seed(0)), -1)
    formats = (fb.Int(4, "tensor", False), Log2(4, "tensor", 1, False), Log2(4, "tensor", 2, False))
    found = [float((fb.quantize(X, f).dequantize() - X).norm() / X.norm()) for f in formats]
    assert found == pytest.approx([uniform, log2, root2], rel=0.08)
    assert found[2] <= 0.6 * found[1] and (std == 4 or found[2] <= 0.6 * found[0])


def test_share_of_zeroed_values() -> None:
    X = torch.softmax(2 * torch.randn(256, 64, generator=torch.Generator().manual_seed(0)), -1)
    zeroed = [float((fb.quantize(X, Log2(4, "tensor", root, False)).dequantize() == 0).float().mean()) for root in (1, 2)]
    assert zeroed[0] < 0.05 and 0.45 < zeroed[1] < 0.75


def test_signs() -> None:
    W = torch.randn(4, 64)
    w = fb.quantize(W, Log2(7, root=2)).dequantize()
    assert torch.equal(w.sign(), W.sign()) and ((w / W).log2().abs() < 0.272).all()  # the widest cell: from (1 + √½)/2 down to √½
    assert fb.quantize(-W.abs(), Log2(4, signed=False)).dequantize().abs().max() == 0
