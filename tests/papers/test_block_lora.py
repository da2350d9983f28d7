"""Block-LoRA (arXiv:2501.16720): one A under a sum of blocks, and the LoRA that it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import finebits as fb
from finebits.adapters.base import Base


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_it_is_lora_of_rank_r_over_k_whose_b_learns_k_times_as_fast(optimizer: Any) -> None:
    """Fifty steps in float64, from the same A."""
    k, r, lr = 4, 2, 3e-3
    gen = torch.Generator().manual_seed(0)
    W, X, Y = (torch.randn(s, generator=gen, dtype=torch.float64) for s in ((9, 14), (40, 14), (40, 9)))
    A = torch.randn(r, 14, generator=gen, dtype=torch.float64)

    def trained(adapter: Any, ratio: float) -> Tensor:
        p = {"A": A.clone(), "B": torch.zeros(adapter.shapes(9, 14)["B"], dtype=torch.float64)}
        steps = optimizer([{"params": [p["A"].requires_grad_()], "lr": lr}, {"params": [p["B"].requires_grad_()], "lr": ratio * lr}])
        for _ in range(50):
            steps.zero_grad()
            (adapter.forward(p, X, Base(W)) - Y).square().mean().backward()
            steps.step()
        if ratio == 1:
            blocks = p["B"].unflatten(1, (k, r))
            assert blocks.any() and all(torch.equal(blocks[:, i], blocks[:, 0]) for i in range(k))
        return adapter.merged(p, W).detach()

    one = trained(fb.BlockLoRA(rank=r, alpha=2.0 * r, blocks=k), 1)
    other = trained(fb.LoRA(rank=r, alpha=2.0 * r), k)
    assert (one - W).abs().max() > 1e-2
    assert (one - other).abs().max() < 1e-12


def test_the_one_a_has_the_gradients_of_all_blocks() -> None:
    adapter, W, x, g = fb.BlockLoRA(rank=3, alpha=6.0, blocks=2), torch.randn(7, 11), torch.randn(5, 11), torch.randn(5, 7)
    p = {"A": torch.randn(3, 11, requires_grad=True), "B": torch.randn(7, 6)}
    adapter.forward(p, x, Base(W)).backward(g)
    G = g.mT @ x
    torch.testing.assert_close(p["A"].grad, adapter.s * (p["B"][:, :3].mT @ G + p["B"][:, 3:].mT @ G), rtol=1e-4, atol=1e-4)


def test_counts_and_export() -> None:
    adapter = fb.BlockLoRA(rank=2, blocks=4)  # the authors' r = 8 in 4 blocks
    assert adapter.size(100, 60) == 60 * 8 // 4 + 100 * 8
    L, R = adapter.lowrank({"A": torch.randn(2, 60), "B": torch.randn(100, 8)})
    assert L.shape == (100, 2) and R.shape == (2, 60)
    with pytest.raises(ValueError, match="blocks is 0"):
        fb.BlockLoRA(blocks=0)
