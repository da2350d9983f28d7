"""Truncated SVD: as good as the full one, the same every time, honest about what it captured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finebits.linalg import top_svd


def spectrum(m: int, n: int, decay: float) -> torch.Tensor:
    k = min(m, n)
    U, V = torch.linalg.qr(torch.randn(m, k)).Q, torch.linalg.qr(torch.randn(n, k)).Q
    return U * torch.arange(1, k + 1).float() ** -decay @ V.mT


@pytest.mark.parametrize("shape", [(320, 300), (300, 320), (500, 260)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_energy_is_the_full_svds(shape: tuple[int, int], decay: float) -> None:
    M = spectrum(*shape, decay) if decay else torch.randn(shape)
    fast, full = top_svd(M, 16), top_svd(M, 16, exact=True)
    assert fast.captured >= full.captured * 0.995
    assert fast.captured <= full.captured + 1e-5
    got = float(((fast.U * fast.S @ fast.Vh) - M).square().sum() / M.square().sum())
    assert got == pytest.approx(1 - fast.captured, abs=1e-4)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_shapes_factors_and_order(m: int, n: int, rank: int) -> None:
    rank = min(rank, m, n)
    M = torch.randn(m, n)
    U, S, Vh, captured = top_svd(M, rank)
    assert U.shape == (m, rank) and S.shape == (rank,) and Vh.shape == (rank, n)
    torch.testing.assert_close(U.mT @ U, torch.eye(rank), rtol=0, atol=1e-4)
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(rank), rtol=0, atol=1e-4)
    assert (S[:-1] >= S[1:] - 1e-6).all() and 0 < captured <= 1 + 1e-5
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_a_flat_residual_gives_almost_all_that_there_is(rank: int) -> None:
    W = torch.randn(640, 700)
    E = W - W.div(0.3).round().clamp(-3, 3) * 0.3
    assert top_svd(E, rank).captured >= 0.998 * top_svd(E, rank, exact=True).captured


def test_singular_values_that_are_all_the_same() -> None:
    """More equal ones than a block has columns: every subspace of the rank is as good."""
    M = torch.linalg.qr(torch.randn(500, 500)).Q
    U, S, Vh, captured = top_svd(M, 20)
    assert captured == pytest.approx(20 / 500, rel=1e-3)
    torch.testing.assert_close(U.mT @ U, torch.eye(20), rtol=0, atol=1e-3)
    torch.testing.assert_close(U.mT @ M @ Vh.mT, S.diag(), rtol=0, atol=1e-3)


def test_krylov_factors_are_orthonormal() -> None:
    U, S, Vh, _ = top_svd(spectrum(300, 400, 1.0), 12)
    torch.testing.assert_close(U.mT @ U, torch.eye(12), rtol=0, atol=1e-4)
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(12), rtol=0, atol=1e-3)


def test_the_same_every_time_and_apart_from_the_worlds_randomness() -> None:
    M = torch.randn(300, 400)
    first = top_svd(M, 8)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    again = top_svd(M, 8)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_tall_is_wide_turned() -> None:
    M = spectrum(400, 300, 1.0)
    tall, wide = top_svd(M, 5), top_svd(M.mT, 5)
    torch.testing.assert_close(tall.S, wide.S, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tall.U * tall.S @ tall.Vh, (wide.U * wide.S @ wide.Vh).mT, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 7), (300, 300)], ids=str)
def test_zero_and_low_rank_matrices(shape: tuple[int, int]) -> None:
    U, S, Vh, captured = top_svd(torch.zeros(shape), 3)
    assert torch.equal(S, torch.zeros(3)) and captured == 1.0
    assert torch.isfinite(U).all() and torch.isfinite(Vh).all()
    M = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    U, S, Vh, captured = top_svd(M, 3)
    assert torch.isfinite(U).all() and torch.isfinite(Vh).all()
    torch.testing.assert_close(U * S @ Vh, M, rtol=1e-3, atol=1e-3)
    assert captured == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scale_passes_through(scale: float) -> None:
    M = torch.randn(300, 310)
    torch.testing.assert_close(top_svd(scale * M, 4).S, scale * top_svd(M, 4).S, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_rank_that_is_none_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="4x9"):
        top_svd(torch.randn(4, 9), rank)


def test_low_precision_is_computed_in_float32() -> None:
    M = torch.randn(20, 30)
    assert top_svd(M.bfloat16(), 4).S.dtype == torch.float32
