"""MiSS (arXiv:2409.15371): one matrix for all shards of the inputs."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.adapters import _rows
from finebits.adapters.base import Base
from papers.stock_peft import trained, under

KINDS = {  # what PEFT calls them, over shapes that it has them for
    "plain": (True, fb.MiSS(rank=4), (12, 20)),
    "a shard cut off": (True, fb.MiSS(rank=6), (12, 20)),
    "bat": ("bat", fb.MiSS(rank=4, bat=True), (12, 20)),
    "mini": ("mini", fb.MiSS(rank=4, mini=3), (12, 20)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1 << 20, 100])
def test_values_and_gradients_are_those_of_peft(kind: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import MissConfig

    monkeypatch.setattr(_rows, "SLAB", tile)
    named, miss, (m, n) = KINDS[kind]
    W, b, x = torch.randn(m, n), torch.randn(m), torch.randn(5, n)
    layer = under(MissConfig(r=miss.rank, target_modules=["0"], init_weights=named, mini_r=miss.mini or 1), W, b)
    (theirs,) = trained(layer).values()
    p = {"block": theirs.detach().clone().requires_grad_()}
    ours, wanted = miss.forward(p, x, Base(W, b)), layer(x)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(p["block"].grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_bat_at_the_edges_is_bat_of_the_weight_in_a_frame_of_zeros() -> None:
    W, D = torch.randn(7, 11), torch.randn(2, 4, 4)
    framed = torch.zeros(8, 12)
    framed[:7, :11] = W
    bat = fb.MiSS(rank=4, bat=True)
    torch.testing.assert_close(bat.merged({"block": D}, W), bat.merged({"block": D}, framed)[:7, :11])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="64 columns .* has 20"):
        fb.MiSS(rank=64).shapes(12, 20)
    with pytest.raises(ValueError, match="periods of 5 rows, which 12"):
        fb.MiSS(rank=4, mini=5).shapes(12, 20)
    with pytest.raises(ValueError, match="mini is 5 with bat"):
        fb.MiSS(rank=4, mini=5, bat=True)
