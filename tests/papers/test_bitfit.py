"""BitFit (arXiv:2106.10199): vectors beside the outputs."""

from __future__ import annotations

import torch

import finebits as fb
from finebits.adapters.base import Base


def test_its_gradient_is_the_sum_of_what_comes_back() -> None:
    W, x, delta = fb.quantize(torch.randn(12, 64), fb.NF(4)), torch.randn(3, 5, 64), torch.randn(3, 5, 12)
    b = torch.zeros(12, requires_grad=True)
    (fb.BitFit().forward({"b": b}, x, Base(W)) * delta).sum().backward()
    torch.testing.assert_close(b.grad, delta.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_parameter_count_of_bert_without_its_norms() -> None:
    """BERT-base: 12 layers of four 768-wide layers, one 3072 wide and one 768 wide; its norms' 12·2·768 + 768 come to 102,144."""
    each = 4 * fb.BitFit().size(768, 768) + fb.BitFit().size(3072, 768) + fb.BitFit().size(768, 3072)
    assert 12 * each + 12 * 2 * 768 + 768 == 102_144
