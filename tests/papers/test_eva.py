"""EVA: the directions of the inputs, and ranks by what they explain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import finebits as fb
from finebits.init.eva import EVA
from finebits.stats.gram import Gram
from papers.gram import inputs, seen


def test_no_orthonormal_rows_hold_more_of_the_inputs() -> None:
    X, W = inputs(300, 43), torch.randn(19, 43)
    base, p = EVA()(W, fb.LoRA(rank=5, alpha=15.0), lambda V: V, seen(X, None, Gram))
    A = p["A"]
    torch.testing.assert_close(A @ A.mT, torch.eye(5), rtol=0, atol=1e-5)
    held = (X @ A.mT).square().sum()
    assert held == pytest.approx(float(torch.linalg.svdvals(X)[:5].square().sum()), rel=1e-4)
    for _ in range(100):
        assert (X @ torch.linalg.qr(torch.randn(43, 5)).Q).square().sum() < held
    assert torch.equal(base, W)


def test_chunks_of_the_data_give_the_same_directions() -> None:
    X = inputs(200, 31)
    whole, pieces = seen(X, None, Gram), seen(X[:20], None, Gram)
    for part in X[20:].split(20):
        pieces[Gram].add(part)
    one, other = (EVA()(torch.randn(19, 31), fb.LoRA(rank=4), lambda V: V, s)[1]["A"] for s in (whole, pieces))
    assert torch.linalg.svdvals(one @ other.mT).min() > 0.999


@pytest.mark.parametrize("tokens", [300, 4000])
def test_whitened_rows_are_divided_by_the_root_of_the_singular_values_of_all_tokens(tokens: int) -> None:
    """The code: components_ / sqrt(singular_values_) of a PCA of all that it saw (here of inputs whose mean is zero, as it centres them)."""
    X = inputs(tokens, 43)
    X = X - X.mean(0)
    _, S, Vh = np.linalg.svd(X.double().numpy(), full_matrices=False)
    _, p = EVA(whiten=True)(torch.randn(19, 43), fb.LoRA(rank=5), lambda V: V, seen(X, None, Gram))
    theirs, ours = Vh[:5] / np.sqrt(S[:5])[:, None], p["A"].double().numpy()
    np.testing.assert_allclose(np.abs(theirs @ ours.T).diagonal(), 1 / S[:5], rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1), rtol=1e-3)
    _, p = EVA(whiten=True)(torch.randn(19, 43), fb.LoRA(rank=5), lambda V: V, seen(torch.randn(2, 43), None, Gram))
    assert torch.isfinite(p["A"]).all()
