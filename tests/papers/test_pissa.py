"""PiSSA: the principal part moves into the adapter, for any alpha."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.init.pissa import PiSSA
from golden.values import golden, signed


@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 5.0, 40.0])
def test_the_adapter_holds_the_top_triples_and_the_rest_begins_with_the_next(shape: tuple[int, int], alpha: float) -> None:
    W, adapter = torch.randn(shape), fb.LoRA(rank=5, alpha=alpha)
    base, p = PiSSA()(W, adapter, lambda V: V, {})
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(adapter.merged(p, base), W, rtol=1e-5, atol=1e-5)
    assert (adapter.s * p["B"] @ p["A"]).square().sum() == pytest.approx(float(S[:5].square().sum()), rel=1e-5)
    assert torch.linalg.matrix_norm(base, 2) == pytest.approx(float(S[5]), rel=1e-4)
    torch.testing.assert_close(p["B"].norm(dim=0), p["A"].norm(dim=1), rtol=1e-4, atol=1e-5)


def test_a_large_weight_with_a_decaying_spectrum_is_captured() -> None:
    U, V = torch.linalg.qr(torch.randn(300, 300)).Q, torch.linalg.qr(torch.randn(260, 260)).Q
    S = torch.arange(1.0, 261) ** -0.5
    _, p = PiSSA()(U[:, :260] * S @ V, fb.LoRA(rank=8, alpha=8.0), lambda V: V, {})
    assert (p["B"] @ p["A"]).square().sum() > 0.999 * S[:8].square().sum()


def test_a_weight_of_lower_rank_leaves_trainable_factors() -> None:
    W = torch.randn(20, 2) @ torch.randn(2, 30)
    base, p = PiSSA()(W, fb.LoRA(rank=6, alpha=6.0), lambda V: V, {})
    assert base.abs().max() < 1e-4 and torch.linalg.matrix_rank(p["A"]) == 6
    assert PiSSA()(torch.zeros(20, 30), fb.LoRA(rank=6), lambda V: V, {})[1] == {}


def test_a_rank_above_the_matrix_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="rank of at most 4 for a 4x30"):
        PiSSA()(torch.randn(4, 30), fb.LoRA(rank=5), lambda V: V, {})
    with pytest.raises(ValueError, match="NaN or Inf"):
        PiSSA()(torch.full((9, 30), torch.inf), fb.LoRA(rank=5), lambda V: V, {})


def test_the_factors_of_peft() -> None:
    """As merged into PEFT, which takes alpha out of the singular values too. Signs of singular vectors are free."""
    theirs = golden("pissa")
    base, p = PiSSA()(theirs["W"], fb.LoRA(rank=5, alpha=8.0), lambda V: V, {})
    sign = signed(p["A"], theirs["A"])
    torch.testing.assert_close(sign[:, None] * p["A"], theirs["A"], rtol=0, atol=1e-5)
    torch.testing.assert_close(sign * p["B"], theirs["B"], rtol=0, atol=1e-5)
    torch.testing.assert_close(base, theirs["base"], rtol=0, atol=1e-5)
