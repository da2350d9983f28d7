"""GPTQ: the textbook procedure column by column, what changes nothing, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import finebits as fb
from finebits.quantizers.gptq import GPTQ, inverse_factor
from finebits.quantizers.rtn import RTN
from finebits.stats.gram import Gram
from golden.values import golden
from papers.gram import inputs, output_error, seen

FORMATS = [fb.NF(2, block=16), fb.NF(3, block=64), fb.Int(3, block=32, symmetric=False, scale="fp16")]


def textbook(W: Tensor, R: Tensor, format: fb.NF, damp: float) -> Tensor:
    """Optimal brain quantization in a fixed order (the paper's eqs. 2 and 3): H⁻¹ loses the row and column of every weight that is fixed."""
    n = W.shape[1]
    H = R.double() + damp * R.diagonal().double().mean() * torch.eye(n, dtype=torch.float64)
    inv, W, Q = torch.linalg.inv(H), W.double().clone(), torch.zeros_like(W, dtype=torch.float64)
    for j in range(n):
        if j % format.block == 0:
            parts = format.fit(W[:, j : j + format.block].float())
        one = format.scales(parts, 1)
        Q[:, j] = format.decode(format.encode(W[:, j : j + 1].float(), one), one)[:, 0]
        W -= torch.outer((W[:, j] - Q[:, j]) / inv[j, j], inv[j])
        inv -= torch.outer(inv[:, j], inv[j]) / inv[j, j]
        inv[j], inv[:, j] = 0, 0
    return Q.float()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_it_is_optimal_brain_quantization_in_a_fixed_order(format: fb.NF) -> None:
    W, stats = torch.randn(7, 83), seen(inputs(200, 83), None, Gram)
    ours = GPTQ()(W, format, stats).dequantize()
    R = stats[Gram].value()
    theirs, rtn = textbook(W, R, format, 0.01), RTN()(W, format, {}).dequantize()
    row = lambda V: ((V - W) @ R * (V - W)).sum(-1)  # noqa: E731
    kept = row(theirs) <= row(rtn)
    assert kept.any()
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "format", "act_order"),
    [
        ("symmetric", fb.Int(4, block=16, variant="full"), False),
        ("asymmetric", fb.Int(4, block=16, symmetric=False, variant="integer"), False),
        ("ordered", fb.Int(4, block=16, symmetric=False, variant="integer"), True),
    ],
)
def test_the_authors_weights(name: str, format: fb.Int, act_order: bool) -> None:
    theirs = golden("gptq")
    ours = GPTQ(act_order=act_order)(theirs["W"], format, seen(theirs["X"], None, Gram)).dequantize()
    torch.testing.assert_close(ours, theirs[name], rtol=0, atol=1e-5)


def test_the_factor_of_the_inverse() -> None:
    R = seen(inputs(90, 31), None, Gram)[Gram].value()
    U = inverse_factor(R, 0.1).double()
    H = R.double() + 0.1 * R.diagonal().mean() * torch.eye(31)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.mT @ U @ H, torch.eye(31, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_without_structure_give_round_to_nearest(format: fb.NF, act_order: bool) -> None:
    W = torch.randn(5, 50)
    stats = seen(50**0.5 * torch.eye(50), None, Gram)
    assert torch.equal(GPTQ(act_order=act_order)(W, format, stats).codes(), RTN()(W, format, {}).codes())


@pytest.mark.parametrize("settings", [{}, {"act_order": True}, {"scales": "search"}, {"act_order": True, "scales": "search"}], ids=str)
@pytest.mark.parametrize("lazy", [1, 48, 64])
def test_lazy_updates_change_nothing(settings: dict, lazy: int) -> None:
    W, stats, format = torch.randn(6, 130), seen(inputs(300, 130), None, Gram), fb.NF(3, block=32)
    one, other = GPTQ(lazy=4096, **settings)(W, format, stats), GPTQ(lazy=lazy, **settings)(W, format, stats)
    torch.testing.assert_close(one.dequantize(), other.dequantize(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("format", [*FORMATS, fb.NF(3, block=32, scale="double"), fb.NF(3, block="row"), fb.VQ(M=1, K=16, g=2)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"act_order": True}, {"scales": "search"}], ids=str)
def test_the_output_error_of_correlated_inputs_falls(format: fb.NF, settings: dict) -> None:
    W, stats = torch.randn(33, 96), seen(inputs(400, 96), None, Gram)
    R = stats[Gram].value()
    loss = lambda q: output_error(q.dequantize(), W, R)  # noqa: E731
    q = GPTQ(**settings)(W, format, stats)
    assert loss(q) < 0.75 * loss(RTN()(W, format, {}))
    assert 8 * q.nbytes == format.storage_bits(33, 96)


def test_searched_scales_serve_the_output() -> None:
    W, stats = torch.randn(33, 96), seen(inputs(400, 96), None, Gram)
    loss = lambda q: output_error(q.dequantize(), W, stats[Gram].value())  # noqa: E731
    own, searched = (loss(GPTQ(scales=s)(W, fb.NF(2, block=32), stats)) for s in ("format", "search"))
    assert searched < 0.7 * own


def test_fewer_tokens_than_columns_and_unseen_columns() -> None:
    W, X = torch.randn(9, 60), torch.randn(11, 60)
    X[:, 17:23] = 0
    stats, format = seen(X, None, Gram), fb.Int(3, block=20)
    q, rtn = GPTQ()(W, format, stats).dequantize(), RTN()(W, format, {}).dequantize()
    R = stats[Gram].value()
    assert output_error(q, W, R) < output_error(rtn, W, R)
    still = GPTQ()(W, format, seen(torch.zeros(3, 60), None, Gram)).dequantize()
    assert torch.equal(still, rtn)


def test_a_statistic_that_does_not_serve_is_refused() -> None:
    W, format = torch.randn(5, 40), fb.NF(3)
    with pytest.raises(ValueError, match="needs Gram"):
        GPTQ()(W, format, {})
    with pytest.raises(ValueError, match="another module's"):
        GPTQ()(W, format, seen(torch.randn(50, 41), None, Gram))
    X = torch.randn(50, 40)
    X[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        GPTQ()(W, format, seen(X, None, Gram))
    with pytest.raises(ValueError, match="8 divides"):
        GPTQ()(torch.randn(5, 42), fb.VQ(), seen(torch.randn(50, 42), None, Gram))
    for setting in ({"damp": -1.0}, {"lazy": 0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            GPTQ(**setting)
