"""LQ-LoRA: low-rank first, best iterate, and what the Fisher information is for."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.init.loftq import LoftQ
from finebits.init.lq_lora import LQLoRA
from finebits.stats.fisher_diag import FisherDiag
from golden.values import golden
from papers.gram import seen


class Held(FisherDiag):
    """A Fisher information given as it is."""

    def __init__(self, F: torch.Tensor) -> None:
        super().__init__()
        self.total, self.tokens = F, 1


def left(init, W: torch.Tensor, bits: int = 3, rank: int = 16, **stats: torch.Tensor) -> torch.Tensor:  # noqa: ANN001
    adapter = fb.LoRA(rank=rank, alpha=3.0 * rank)
    Q, p = init(W, adapter, lambda V: fb.quantize(V, fb.NF(bits)), {FisherDiag: Held(stats["F"])} if stats else {})
    return W - adapter.merged(p, Q)


def test_low_rank_first_matters_where_the_spectrum_decays() -> None:
    U, V = (torch.linalg.qr(torch.randn(192, 192)).Q for _ in range(2))
    for W, share in ((torch.randn(192, 192), 0.97), (U / torch.arange(1.0, 193) @ V, 0.4)):
        assert left(LQLoRA(), W, 4).norm() <= share * left(LoftQ(), W, 4).norm()


def test_the_best_iterate_is_returned() -> None:
    W = torch.randn(64, 80)
    losses = [float(left(LQLoRA(steps=t), W, 2, 8).norm()) for t in (1, 2, 4, 30)]
    assert all(b <= a * (1 + 1e-5) for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < losses[0]


def test_a_separable_fisher_information_weighs_and_an_even_one_does_not() -> None:
    W = torch.randn(96, 128)
    outer = torch.outer(torch.logspace(0, -2, 96), torch.logspace(-2, 0, 128))[:, torch.randperm(128)]
    weighted = lambda init, F: float((F.sqrt() * left(init, W, F=F)).norm())  # noqa: E731
    assert weighted(LQLoRA(weighting="fisher"), outer) < 0.85 * weighted(LQLoRA(), outer)
    even = torch.ones(96, 128)
    assert weighted(LQLoRA(weighting="fisher"), even) == pytest.approx(weighted(LQLoRA(), even), rel=0.03)


def test_the_statistic_is_the_mean_of_squared_gradients() -> None:
    x, g = torch.randn(13, 7), torch.randn(13, 5)
    wanted = torch.stack([torch.outer(b, a).square() for a, b in zip(x, g, strict=True)]).mean(0)
    torch.testing.assert_close(seen(x, g, FisherDiag)[FisherDiag].value(), wanted)


def test_rows_without_information() -> None:
    W, F = torch.randn(20, 32), torch.rand(20, 32)
    F[3:7] = 0
    assert torch.isfinite(left(LQLoRA(weighting="fisher"), W, rank=4, F=F)).all()
    assert torch.isfinite(left(LQLoRA(weighting="fisher"), W, rank=4, F=torch.zeros(20, 32))).all()
    with pytest.raises(ValueError, match="NaN or Inf"):
        left(LQLoRA(weighting="fisher"), W, rank=4, F=torch.full((20, 32), torch.nan))
    with pytest.raises(ValueError, match="needs FisherDiag"):
        LQLoRA(weighting="fisher")(W, fb.LoRA(rank=4), lambda V: V, {})


def test_the_authors_weighted_factors() -> None:
    theirs, adapter, base = golden("lq_lora"), fb.LoRA(rank=4, alpha=10.0), []
    W, L1L2 = theirs["W"], theirs["L1L2"]
    _, p = LQLoRA(steps=1, weighting="fisher")(W, adapter, lambda V: base.append(V) or V, {FisherDiag: Held(theirs["F"])})
    torch.testing.assert_close(adapter.s * p["B"] @ p["A"], L1L2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(base[0], W - L1L2, rtol=1e-4, atol=1e-4)
