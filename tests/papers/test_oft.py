"""OFT (arXiv:2306.07280): the inputs turned, block by block."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.adapters.base import Base
from papers.stock_peft import trained, under


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("terms", [0, 4, 5, 7])
def test_values_and_gradients_are_those_of_peft(terms: int, alike: bool) -> None:
    from peft import OFTConfig

    W, b, x = torch.randn(12, 20), torch.randn(12), torch.randn(5, 20)
    series = {"use_cayley_neumann": terms > 0, "num_cayley_neumann_terms": terms}
    layer = under(OFTConfig(oft_block_size=4, r=0, block_share=alike, target_modules=["0"], **series), W, b)
    (theirs,) = trained(layer).values()
    sign = 1 if terms else -1  # of the exact transform PEFT has the inverse
    R = (sign * theirs.detach()).requires_grad_()
    adapter = fb.OFT(block=4, terms=terms, alike=alike)
    ours, wanted = adapter.forward({"R": R}, x, Base(W, b)), layer(x)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    (ours * x[:, :12]).sum().backward()
    (wanted * x[:, :12]).sum().backward()
    torch.testing.assert_close(R.grad, sign * theirs.grad, rtol=1e-4, atol=1e-4)  # type: ignore[operator]


def test_lengths_and_angles_of_neurons_stay() -> None:
    W, R = torch.randn(12, 20), torch.randn(5, 6)
    turned = fb.OFT(block=4, terms=0).merged({"R": R}, W)
    torch.testing.assert_close(turned @ turned.mT, W @ W.mT, rtol=1e-4, atol=1e-4)
    assert (turned - W).norm() > W.norm()


def test_the_series_comes_near_the_exact_transform() -> None:
    W, R = torch.randn(12, 20), 0.05 * torch.randn(5, 6)
    exact = fb.OFT(block=4, terms=0).merged({"R": R}, W)
    errors = [float((fb.OFT(block=4, terms=t).merged({"R": R}, W) - exact).norm()) for t in (4, 6, 9)]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    with pytest.raises(ValueError, match="blocks of 32 inputs, and 20 inputs have blocks of 2, 4, 5, 10, 20"):
        fb.OFT().shapes(12, 20)
    for wrong in ({"block": 1}, {"terms": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fb.OFT(**wrong)
