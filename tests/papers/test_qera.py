"""QERA: no other correction of the rank has a smaller output error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import finebits as fb
from finebits.init.lorc import LoRC
from finebits.init.qera import QERA
from finebits.stats.gram import Gram
from finebits.stats.mean_square import MeanSquare
from golden.values import golden
from papers.gram import inputs, output_error, seen


def start(W: torch.Tensor, stats: dict, damp: float = 1e-6, alpha: float = 12.0):  # noqa: ANN201
    adapter, quantize = fb.LoRA(rank=5, alpha=alpha), lambda V: fb.quantize(V, fb.NF(2, block=16))
    Q, p = QERA(damp=damp)(W, adapter, quantize, stats)
    return Q.dequantize(), adapter.s * p["B"] @ p["A"]


@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
@pytest.mark.parametrize("alpha", [2.0, 5.0, 40.0])
def test_theorem_1_the_error_is_the_tail_of_the_weighted_svd(shape: tuple[int, int], alpha: float) -> None:
    W, stats = torch.randn(shape), seen(inputs(300, shape[1], decay=1), None, Gram)
    R = stats[Gram].value().double()
    Q, C = start(W, stats, alpha=alpha)
    values, vectors = torch.linalg.eigh(R)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT  # the paper's symmetric root
    tail = torch.linalg.svdvals((W - Q).double() @ root)[5:].square().sum()
    assert output_error(Q + C, W, R) == pytest.approx(float(tail), rel=1e-3)


def test_no_other_correction_of_the_rank_is_better() -> None:
    W, stats = torch.randn(17, 33), seen(inputs(200, 33), None, Gram)
    R = stats[Gram].value()
    Q, C = start(W, stats)
    best = output_error(Q + C, W, R)
    U, S, Vh = torch.linalg.svd(C)
    B, A = U[:, :5] * S[:5], Vh[:5]
    for scale in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            other = (B + scale * torch.randn_like(B) * S[4]) @ (A + scale * torch.randn_like(A))
            assert output_error(Q + other, W, R) >= best * (1 - 1e-5)
    plain, p = LoRC()(W, fb.LoRA(rank=5, alpha=5.0), lambda V: fb.quantize(V, fb.NF(2, block=16)), {})
    assert best < 0.8 * output_error(plain.dequantize() + p["B"] @ p["A"], W, R)


def test_inputs_without_structure_give_the_svd_of_the_error() -> None:
    W, stats = torch.randn(17, 33), seen(33**0.5 * torch.eye(33), None, Gram)
    Q, C = start(W, stats)
    _, p = LoRC()(W, fb.LoRA(rank=5, alpha=5.0), lambda V: fb.quantize(V, fb.NF(2, block=16)), {})
    torch.testing.assert_close(C, p["B"] @ p["A"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damp", [0.0, 1e-6, 1e-4])
def test_fewer_tokens_than_inputs(damp: float) -> None:
    """Four tokens can be served by rank five without any error."""
    W, stats = torch.randn(17, 33), seen(torch.randn(4, 33), None, Gram)
    R = stats[Gram].value()
    Q, C = start(W, stats, damp=damp)
    assert output_error(Q + C, W, R) < 1e-3 * output_error(Q, W, R)
    assert C.norm() < 2 * (W - Q).norm()


def test_what_cannot_be_served() -> None:
    stats, adapter = seen(torch.randn(50, 20), None, Gram), fb.LoRA(rank=4)
    with pytest.raises(ValueError, match="QERA needs Gram"):
        QERA()(torch.randn(9, 20), adapter, lambda V: V, {})
    with pytest.raises(ValueError, match="rank of at most 3"):
        QERA()(torch.randn(3, 20), adapter, lambda V: V, stats)
    with pytest.raises(ValueError, match="NaN or Inf"):
        QERA()(torch.full((9, 20), torch.nan), adapter, lambda V: V, stats)
    with pytest.raises(ValueError, match="calibration data"):
        QERA()(torch.randn(9, 20), adapter, lambda V: V, seen(torch.full((5, 20), torch.nan), None, Gram))
    with pytest.raises(ValueError, match="another module"):
        QERA()(torch.randn(9, 21), adapter, lambda V: V, stats)
    Q, p = QERA()(torch.zeros(9, 20), adapter, lambda V: fb.quantize(V, fb.NF(2, block=16)), stats)
    assert not Q.dequantize().any() and p == {}


def test_theorem_2_the_diagonal_metric_is_the_root_mean_square_of_the_inputs() -> None:
    X, W, adapter = inputs(300, 43), torch.randn(19, 43), fb.LoRA(rank=5, alpha=12.0)
    stats, init = seen(X, None, MeanSquare), QERA(metric="approx", damp=1e-7)
    Q, p = init(W, adapter, lambda V: fb.quantize(V, fb.NF(2, block=16)), stats)
    x, w, q = X.double().numpy(), W.double().numpy(), Q.dequantize().double().numpy()
    S = np.sqrt((x**2).mean(0))
    U, s, Vh = np.linalg.svd((w - q) * S, full_matrices=False)
    C = (U[:, :5] * s[:5]) @ (Vh[:5] / S)
    ours = (adapter.s * p["B"] @ p["A"]).double().numpy()
    assert np.linalg.norm(ours - C) / np.linalg.norm(C) < 1e-4 and init.needs == {MeanSquare}


@pytest.mark.parametrize(
    ("init", "name"), [(QERA(damp=0.0), "exact"), (QERA(damp=0.0, metric="approx"), "approx"), (LoRC(), "identity")], ids=str
)
def test_the_authors_product(init: QERA | LoRC, name: str) -> None:
    theirs, adapter = golden("qera"), fb.LoRA(rank=5, alpha=8.0)
    _, p = init(theirs["W"], adapter, lambda V: theirs["Q"], seen(theirs["X"], None, Gram, MeanSquare))
    torch.testing.assert_close(adapter.s * p["B"] @ p["A"], theirs[name], rtol=0, atol=1e-5)
