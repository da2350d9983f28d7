"""HiRA (OpenReview TwJrTz9cRS): the weight times a low-rank matrix."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.adapters import _rows
from finebits.adapters.base import Base
from papers.stock_peft import trained, under

HIRA = fb.HiRA(rank=3)


@pytest.mark.parametrize("tile", [1 << 20, 50])
def test_values_and_gradients_are_those_of_peft(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import HiraConfig

    monkeypatch.setattr(_rows, "SLAB", tile)
    W, b, x, y = torch.randn(12, 20), torch.randn(12), *(torch.randn(2, 5, 20).repeat(2, 1, 1, 1))
    layer = under(HiraConfig(r=3, target_modules=["0"]), W, b)
    held = {name.split(".")[0][-1]: t for name, t in trained(layer).items()}
    p = {k: t.detach().clone().requires_grad_() for k, t in held.items()}
    x, y = x.requires_grad_(), x.detach().clone().requires_grad_()
    ours, wanted = HIRA.forward(p, x, Base(W, b)), layer(y)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    for k, t in held.items():
        torch.testing.assert_close(p[k].grad, t.grad, rtol=1e-4, atol=1e-4)


def test_the_update_has_the_rank_of_the_weight() -> None:
    W, p = torch.randn(12, 20), {"A": torch.randn(3, 20), "B": torch.randn(12, 3)}
    assert torch.linalg.matrix_rank(HIRA.merged(p, W) - W) == 12


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    W, x = fb.quantize(torch.randn(64, 128), fb.NF(4)), torch.randn(2, 128, requires_grad=True)
    p = {"A": torch.randn(3, 128, requires_grad=True), "B": torch.randn(64, 3, requires_grad=True)}
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        HIRA.forward(p, x, Base(W))
    assert sum(kept) < 64 * 128 / 4
