"""SRR: the rank is split as the criterion says, and no worse than QERA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import finebits as fb
from finebits.init.qera import QERA
from finebits.init.srr import SRR, left, split
from finebits.stats.gram import Gram
from papers.gram import inputs, output_error, seen

ADAPTER = fb.LoRA(rank=8, alpha=20.0)


def spiked(m: int = 64, n: int = 96) -> torch.Tensor:
    """A weight with a few directions that stand out, which a quantizer's blocks cannot follow."""
    return torch.randn(m, n) + 12 * torch.randn(m, 3) @ torch.randn(3, n)


@pytest.mark.parametrize("bits", [2, 3])
def test_its_three_steps_in_double_precision(bits: int) -> None:
    X, W = inputs(400, 96, decay=0.5), spiked()
    stats, quantize = seen(X, None, Gram), lambda V: fb.quantize(V, fb.NF(bits, block=32))
    Q, p = SRR(damp=1e-7)(W, ADAPTER, quantize, stats)
    x, w = X.double().numpy(), W.double().numpy()
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    S = vectors * np.sqrt(values) @ vectors.T  # the symmetric root
    k = split(W, torch.linalg.cholesky(stats[Gram].value().double()).float(), 8)
    assert 0 < k < 8

    def svd(M: np.ndarray, rank: int) -> np.ndarray:
        U, s, Vh = np.linalg.svd(M @ S, full_matrices=False)
        return (U[:, :rank] * s[:rank]) @ Vh[:rank] @ np.linalg.inv(S)

    C1 = svd(w, k)
    Qk = quantize(torch.from_numpy(w - C1).float()).dequantize().double().numpy()
    whole = Qk + C1 + svd(w - C1 - Qk, 8 - k)
    ours = ADAPTER.merged(p, Q.dequantize()).double().numpy()
    error = lambda V: np.linalg.norm((V - w) @ S)  # noqa: E731
    assert error(ours) == pytest.approx(error(whole), rel=0.02)
    R = stats[Gram].value()
    Q0, p0 = QERA()(W, ADAPTER, quantize, stats)
    assert output_error(ADAPTER.merged(p, Q.dequantize()), W, R) < 0.7 * output_error(ADAPTER.merged(p0, Q0.dequantize()), W, R)


def test_the_split_is_the_least_of_the_product_of_what_is_left() -> None:
    W, S = spiked(), torch.linalg.cholesky(seen(inputs(400, 96, decay=0.5), None, Gram)[Gram].value())
    E = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)).double().numpy() - 0.5
    rho = []
    for M in (W.double().numpy(), E):
        s = np.linalg.svd(M @ S.double().numpy(), compute_uv=False) ** 2
        rho.append(np.array([s[k:].sum() / s.sum() for k in range(9)]))
    np.testing.assert_allclose(left(W @ S, 8).numpy(), rho[0], atol=1e-4)
    assert split(W, S, 8) == int(np.argmin([rho[0][k] * rho[1][8 - k] for k in range(9)]))


def test_a_weight_without_directions_gets_what_qera_gives() -> None:
    W, stats = torch.randn(48, 64), seen(torch.randn(400, 64), None, Gram)
    quantize, R = lambda V: fb.quantize(V, fb.NF(3, block=32)), stats[Gram].value()
    (Q, p), (Q0, p0) = SRR()(W, ADAPTER, quantize, stats), QERA()(W, ADAPTER, quantize, stats)
    error, of_qera = (output_error(ADAPTER.merged(q, b.dequantize()), W, R) for b, q in ((Q, p), (Q0, p0)))
    assert error <= of_qera * (1 + 1e-4)
