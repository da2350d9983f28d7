"""EVA: the directions of the inputs, and ranks by what they explain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import finebits as fb
from finebits.init.eva import EVA
from finebits.ranks.base import adapters
from finebits.ranks.eva_ranks import EVARanks
from finebits.stats.gram import Gram
from golden.values import golden, signed
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


def test_the_ranks_and_directions_of_peft() -> None:
    """Three layers share nine ranks by what directions explain. Their inputs have no mean, which PEFT would subtract."""
    theirs, adapter, ranking = golden("eva"), fb.LoRA(rank=3), EVARanks(rho=2.0)
    stats = {name: seen(torch.cat([theirs[f"Z_{name}"], -theirs[f"Z_{name}"]]), None, Gram) for name in "abc"}
    W = torch.randn(8, 20)
    given = adapters(ranking, {name: ranking.score(W, adapter, s) for name, s in stats.items()}, adapter, dict.fromkeys(stats, (8, 20)))
    for name, s in stats.items():
        A = theirs[f"A_{name}"]
        assert given[name].rank == len(A)
        _, p = EVA()(W, given[name], lambda V: V, s)
        torch.testing.assert_close(signed(p["A"], A)[:, None] * p["A"], A, rtol=0, atol=1e-5)


def test_whitened_rows_and_a_mean_in_peft() -> None:
    """PEFT whitens by the singular values of all that it was shown, here the same batch twice, and sees inputs without their mean."""
    theirs = golden("eva")
    X = torch.cat([theirs["Z_a"], -theirs["Z_a"]])
    for init, shown, A in ((EVA(whiten=True), torch.cat([X, X]), theirs["whitened"]), (EVA(), X, theirs["moved"])):
        _, p = init(torch.randn(8, 20), fb.LoRA(rank=3), lambda V: V, seen(shown, None, Gram))
        torch.testing.assert_close(signed(p["A"], A)[:, None] * p["A"], A, rtol=0, atol=1e-5)
    _, p = EVA()(torch.randn(8, 20), fb.LoRA(rank=3), lambda V: V, seen(X + 1, None, Gram))
    assert torch.linalg.svdvals(p["A"] @ theirs["moved"].mT).min() < 0.9  # here the mean is a direction too
