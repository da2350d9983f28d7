"""CorDA: components ordered by what they do to the inputs seen."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.init.corda import CorDA
from finebits.stats.gram import Gram
from golden.values import golden
from papers.gram import inputs, seen


def parts(mode: str, W: torch.Tensor, stats: dict) -> tuple[torch.Tensor, torch.Tensor]:
    adapter = fb.LoRA(rank=5, alpha=15.0)
    base, p = CorDA(mode=mode)(W, adapter, lambda V: V, stats)
    torch.testing.assert_close(adapter.merged(p, base), W, rtol=1e-4, atol=1e-4)
    return base, adapter.s * p["B"] @ p["A"]


@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
def test_the_weight_through_the_covariance_is_split_at_its_spectrum(shape: tuple[int, int]) -> None:
    W, stats = torch.randn(shape), seen(inputs(300, shape[1], decay=0.5), None, Gram)
    R = stats[Gram].value()
    C = R + 0.01 * R.diagonal().mean() * torch.eye(shape[1])
    S = torch.linalg.svdvals(W @ C)
    for mode, taken in (("preview", S[:5]), ("preserve", S[-5:])):
        _, BA = parts(mode, W, stats)
        torch.testing.assert_close(torch.linalg.svdvals(BA @ C)[:5], taken, rtol=1e-2, atol=1e-3 * float(S[0]))


def test_what_is_preserved_serves_the_inputs_and_what_is_previewed_holds_them() -> None:
    W, X = torch.randn(30, 50), inputs(300, 50)
    stats = seen(X, None, Gram)
    base, _ = parts("preserve", W, stats)
    _, BA = parts("preview", W, stats)
    out = (X @ W.mT).norm()
    assert (X @ (W - base).mT).norm() < 0.05 * out
    _, p = fb.PiSSA()(W, fb.LoRA(rank=5, alpha=5.0), lambda V: V, {})
    assert (X @ (W - BA).mT).norm() < 0.8 * (X @ (W - p["B"] @ p["A"]).mT).norm()


def test_fewer_tokens_than_inputs() -> None:
    for mode in ("preview", "preserve"):
        base, BA = parts(mode, torch.randn(19, 43), seen(torch.randn(7, 43), None, Gram))
        assert torch.isfinite(base).all() and torch.isfinite(BA).all()


def test_the_authors_components() -> None:
    theirs, adapter = golden("corda"), fb.LoRA(rank=5, alpha=8.0)
    for mode in ("preview", "preserve"):
        _, p = CorDA(mode=mode)(theirs["W"], adapter, lambda V: V, seen(theirs["X"], None, Gram))
        torch.testing.assert_close(adapter.s * p["B"] @ p["A"], theirs[mode], rtol=0, atol=1e-4)


def test_the_components_of_peft_whose_batches_are_divided_by_their_largest_entry() -> None:
    theirs, adapter = golden("corda"), fb.LoRA(rank=5, alpha=8.0)
    _, p = CorDA()(theirs["W"], adapter, lambda V: V, seen(torch.cat([x / x.max() for x in theirs["X"].split((20, 25))]), None, Gram))
    torch.testing.assert_close(adapter.s * p["B"] @ p["A"], theirs["peft"], rtol=0, atol=1e-4)
