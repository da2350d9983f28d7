"""LoRC: what is left is the tail of the error's spectrum."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.init.loftq import LoftQ
from finebits.init.lorc import LoRC


@pytest.mark.parametrize("rank", [1, 4, 19])
@pytest.mark.parametrize("alpha", [1.0, 30.0])
def test_the_error_is_the_tail_and_falls_with_the_rank(rank: int, alpha: float) -> None:
    W, adapter, quantize = torch.randn(19, 43), fb.LoRA(rank=rank, alpha=alpha), lambda V: fb.quantize(V, fb.NF(3, block=16))
    Q, p = LoRC()(W, adapter, quantize, {})
    tail = torch.linalg.svdvals(W - Q.dequantize())[rank:].square().sum()
    left = (W - adapter.merged(p, Q)).square().sum()
    torch.testing.assert_close(left, tail, rtol=1e-4, atol=1e-6)
    assert torch.equal(Q.codes(), quantize(W).codes())


def test_it_is_the_first_step_of_loftq() -> None:
    W, adapter, quantize = torch.randn(19, 43), fb.LoRA(rank=4, alpha=2.0), lambda V: fb.quantize(V, fb.NF(3, block=16))
    (_, ours), (_, theirs) = (init(W, adapter, quantize, {}) for init in (LoRC(), LoftQ(steps=1)))
    torch.testing.assert_close(ours["B"] @ ours["A"], theirs["B"] @ theirs["A"])


def test_an_error_of_lower_rank_than_the_adapter_leaves_trainable_factors() -> None:
    W = torch.randn(12, 20)
    spoilt = W - torch.outer(torch.randn(12), torch.randn(20))
    adapter = fb.LoRA(rank=4, alpha=8.0)
    Q, p = LoRC()(W, adapter, lambda V: spoilt, {})
    torch.testing.assert_close(adapter.merged(p, Q), W, rtol=1e-4, atol=1e-5)
    assert p["B"][:, 1:].abs().max() == 0 and (p["A"].norm(dim=1) > 0.1).all()
    assert torch.linalg.matrix_rank(p["A"]) == 4
