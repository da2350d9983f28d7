"""Laws of a quantizer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finebits.formats.base import Format
from finebits.formats.int import Int
from finebits.qtensor import QTensor
from finebits.quantizers.base import Quantizer
from finebits.quantizers.rtn import RTN
from finebits.stats.gram import Gram
from finebits.stats.mean_square import MeanSquare
from variants import formats, methods, quantizers, stats_of

FORMATS = formats((32,), scale=("fp32",))
every = pytest.mark.parametrize("quantizer", quantizers(), ids=str)
FEW = list({type(f): f for f in FORMATS}.values())  # one of every class: enough for quantizers that know nothing of a format
pairs = [(q, f) for q in quantizers() for f in (FORMATS if q == RTN() else FEW)]
every_pair = pytest.mark.parametrize(("quantizer", "format"), pairs, ids=str)


def seen(quantizer: Quantizer, m: int, n: int) -> dict:
    """The statistics that it needs, of inputs whose features are correlated and unequal."""
    X = torch.randn(3 * n, n) @ torch.randn(n, n) * torch.logspace(0, -1, n)
    return stats_of(X, torch.randn(3 * n, m), quantizer.needs)


def norm(quantizer: Quantizer) -> float:
    """The norm of the error that it makes small: 2 unless it says otherwise."""
    return getattr(quantizer, "norm", 2)


def test_folder_is_not_empty() -> None:
    assert methods("quantizers")


@every_pair
def test_never_worse_than_rounding_in_the_metric_it_claims(quantizer: Quantizer, format: Format) -> None:
    W = torch.randn(24, 80)
    stats = seen(quantizer, 24, 80)
    R = torch.eye(80)
    if Gram in quantizer.needs:
        R = stats[Gram].value()
    elif MeanSquare in quantizer.needs:
        R = stats[MeanSquare].value().diag()

    def loss(q: QTensor) -> float:
        D = q.dequantize() - W
        return float(D.abs().sum() if norm(quantizer) == 1 else (D @ R * D).sum())

    assert loss(quantizer(W, format, stats)) <= loss(RTN()(W, format, {})) * (1 + 1e-5)


@every_pair
def test_inputs_without_structure_give_plain_rounding_or_better(quantizer: Quantizer, format: Format) -> None:
    W, X = torch.randn(6, 32), 32**0.5 * torch.eye(32)
    q = quantizer(W, format, stats_of(X, torch.randn(32, 6), quantizer.needs))
    error = lambda q: torch.linalg.vector_norm(q.dequantize() - W, ord=norm(quantizer))  # noqa: E731
    assert error(q) <= error(RTN()(W, format, {})) * (1 + 1e-5)


@every
def test_rounding_to_nearest_is_said(quantizer: Quantizer) -> None:
    W, format = torch.randn(24, 80), Int(3, block=16)
    if quantizer.nearest:
        assert torch.equal(quantizer(W, format, seen(quantizer, 24, 80)).dequantize(), RTN()(W, format, {}).dequantize())


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(5, 40), (2, 5, 40)], ids=str)
def test_a_weight_with_nan_or_inf_is_refused(quantizer: Quantizer, bad: float, shape: tuple[int, ...]) -> None:
    W = torch.randn(shape)
    W[(*[-1] * (len(shape) - 1), 7)] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantizer(W, FORMATS[0], seen(quantizer, 5, 40))


@every
def test_opposite_infinities_are_not_missed(quantizer: Quantizer) -> None:
    W = torch.randn(5, 40)
    W[0, 0], W[4, 3] = torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r"\[0, 0\]"):
        quantizer(W, FORMATS[0], seen(quantizer, 5, 40))


@every_pair
def test_rows_do_not_see_each_other(quantizer: Quantizer, format: Format) -> None:
    if format.shared:
        pytest.skip("rows share a part")
    W, stats = torch.randn(9, 50), seen(quantizer, 9, 50)
    whole = quantizer(W, format, stats).dequantize()
    torch.testing.assert_close(quantizer(W[3:5], format, stats).dequantize(), whole[3:5], rtol=1e-6, atol=1e-6)


@given(
    st.sampled_from(quantizers()),
    st.sampled_from(FORMATS),
    st.integers(1, 7),
    st.integers(1, 70),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_shape_and_dtype_are_the_weights(quantizer: Quantizer, format: Format, m: int, n: int, dtype: str) -> None:
    W = torch.randn(m, n).to(getattr(torch, dtype))
    before = W.clone()
    q = quantizer(W, format, seen(quantizer, m, n))
    assert q.shape == W.shape and q.dtype == W.dtype and q.dequantize().dtype == W.dtype
    assert torch.isfinite(q.dequantize()).all() and not q.requires_grad
    assert torch.equal(W, before)
    assert 8 * q.nbytes == format.storage_bits(m, n)


@every
def test_experts_at_once_are_experts_one_by_one(quantizer: Quantizer) -> None:
    W, stats = torch.randn(3, 5, 40), seen(quantizer, 5, 40)
    q = quantizer(W, FORMATS[0], stats)
    for e in range(3):
        assert torch.equal(q[e].dequantize(), quantizer(W[e], FORMATS[0], stats).dequantize())


@every
def test_a_weight_on_the_grid_is_kept(quantizer: Quantizer) -> None:
    for format in FORMATS if quantizer == RTN() else FEW:
        if format.rounding(torch.device("cpu")) is None:  # mean scales are not found again
            continue
        W = RTN()(torch.randn(6, 64), format, {}).dequantize()
        torch.testing.assert_close(quantizer(W, format, seen(quantizer, 6, 64)).dequantize(), W, rtol=0, atol=2e-6)


@every
def test_a_zero_weight_stays_zero_and_a_poor_one_is_served(quantizer: Quantizer) -> None:
    W, stats = torch.randn(4, 2) @ torch.randn(2, 40), seen(quantizer, 4, 40)
    for format in (FORMATS[0], next(f for f in FORMATS if isinstance(f, Int) and not f.symmetric)):
        assert not quantizer(torch.zeros(4, 40), format, stats).dequantize().any()
        assert torch.isfinite(quantizer(W, format, stats).dequantize()).all()


@every
@pytest.mark.parametrize("tokens", [1, 3])
def test_statistics_of_few_tokens_and_of_inputs_that_are_nothing(quantizer: Quantizer, tokens: int) -> None:
    W = torch.randn(6, 50)
    for X in (torch.randn(tokens, 50), torch.zeros(tokens, 50)):
        q = quantizer(W, FORMATS[0], stats_of(X, torch.randn(tokens, 6), quantizer.needs))
        assert torch.isfinite(q.dequantize()).all()


@every
def test_statistics_that_do_not_serve_are_refused(quantizer: Quantizer) -> None:
    W, X, G = torch.randn(6, 50), torch.randn(90, 50), torch.randn(90, 6)
    for S in quantizer.needs:
        stats = stats_of(X, G, quantizer.needs)
        with pytest.raises(ValueError, match=S.__name__):
            quantizer(W, FORMATS[0], {k: s for k, s in stats.items() if k is not S})
        with pytest.raises(ValueError, match="another module's"):
            quantizer(W, FORMATS[0], stats | stats_of(torch.randn(90, 51), G, {S}))
        assert stats[S].total is not None
        stats[S].total[(0,) * stats[S].total.ndim] = torch.nan
        with pytest.raises(ValueError, match="NaN or Inf"):
            quantizer(W, FORMATS[0], stats)
