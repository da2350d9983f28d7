"""SVDQuant: smoothing and the low-rank branch need each other, and neither changes what is not quantized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import finebits as fb
from finebits.adapters.base import Base, Over
from finebits.init.base import BoundQuantizer
from finebits.init.svdquant import SVDQuant
from finebits.stats.gram import Gram
from papers.gram import inputs, output_error, seen
from variants import methods

INT4 = fb.Int(4, block=64)


def rounded(X: Tensor) -> Tensor:
    return fb.quantize(X, INT4).dequantize()


@pytest.mark.parametrize("seed", [0, 1])
def test_with_4_bit_inputs_both_together_are_far_better_than_either(seed: int) -> None:
    """Eight inputs are thirty times as large. The inputs are rounded here, as the paper's kernels do."""
    torch.manual_seed(seed)
    X, W, adapter = torch.randn(300, 128), torch.randn(128, 128), fb.Smoothed(rank=32, alpha=32.0)
    X[:, torch.randperm(128)[:8]] *= 30
    Y, stats = X @ W.mT, seen(X, None, Gram)
    x, w = X.abs().amax(0), W.abs().amax(0)
    sizes = [x ** (i / 20) / w ** (1 - i / 20) for i in range(21)]
    smooth = min(float((rounded(X / lam) @ rounded(W * lam).mT - Y).norm()) for lam in sizes)

    def error(init: SVDQuant) -> float:
        Q, p = init(W, adapter, lambda V: fb.quantize(V, INT4), stats)
        x = X / p["lam"]
        return float((rounded(x) @ Q.dequantize().mT + x @ p["A"].mT @ p["B"].mT - Y).norm())

    both, branch = error(SVDQuant()), error(SVDQuant(grid=0))
    assert smooth < 0.7 * float((rounded(X) @ rounded(W).mT - Y).norm())
    assert both <= 0.35 * min(smooth, branch)


@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
@pytest.mark.parametrize("alpha", [3.0, 20.0])
def test_nothing_changes_where_nothing_is_quantized(shape: tuple[int, int], alpha: float) -> None:
    W, x, adapter = torch.randn(shape), torch.randn(5, shape[1]), fb.Smoothed(rank=6, alpha=alpha)
    base, p = SVDQuant()(W, adapter, lambda V: V, seen(inputs(90, shape[1]), None, Gram))
    torch.testing.assert_close(adapter.merged(p, base), W, rtol=1e-5, atol=1e-5)
    lam = torch.logspace(-2, 2, shape[1])
    smoothed = adapter.params(Base(W), torch.Generator(), {"lam": lam})
    torch.testing.assert_close(adapter.forward(smoothed, x, Base(W * lam)), x @ W.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [6.0, 24.0])
def test_the_branch_holds_the_principal_part_and_the_base_the_rest(alpha: float) -> None:
    W, adapter = torch.randn(19, 43), fb.Smoothed(rank=6, alpha=alpha)
    quantize = lambda V: fb.quantize(V, fb.NF(3, block=16))  # noqa: E731
    Q, p = SVDQuant(steps=0)(W, adapter, quantize, seen(inputs(90, 43), None, Gram))
    U, S, Vh = torch.linalg.svd(W * p["lam"])
    assert p["lam"].max() > 2 * p["lam"].min()
    torch.testing.assert_close(adapter.s * p["B"] @ p["A"], U[:, :6] * S[:6] @ Vh[:6], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(Q.dequantize(), quantize(W * p["lam"] - adapter.s * p["B"] @ p["A"]).dequantize(), rtol=1e-3, atol=1e-3)


def test_refits_and_more_candidates_never_lose() -> None:
    W, adapter, stats = torch.randn(30, 64), fb.Smoothed(rank=5, alpha=5.0), seen(inputs(200, 64), None, Gram)
    R = stats[Gram].value()

    def error(**settings: int) -> float:
        Q, p = SVDQuant(**settings)(W, adapter, lambda V: fb.quantize(V, fb.NF(2, block=16)), stats)
        return output_error(adapter.merged(p, Q), W, R)

    plain = output_error(fb.quantize(W, fb.NF(2, block=16)).dequantize(), W, R)
    errors = [error(grid=0, steps=0), error(grid=5, steps=0), error(grid=20, steps=0), error(), error(steps=30)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0] < 0.5 * plain


def test_a_lora_can_be_appended_to_the_branch_if_its_factor_takes_lambda() -> None:
    W, lam, x = torch.randn(19, 43), torch.rand(43) + 0.2, torch.randn(7, 43)
    branch, lora = fb.Smoothed(rank=4, alpha=4.0), fb.LoRA(rank=3, alpha=9.0)
    p = {"A": torch.randn(4, 43), "B": torch.randn(19, 4), "lam": lam}
    q = {"A": torch.randn(3, 43), "B": torch.randn(19, 3)}
    over = Over(lora, q, Over(branch, p, Base(W)))(x)
    both = {"B": torch.cat([p["B"], lora.s * q["B"]], 1), "A": torch.cat([p["A"], q["A"] * lam]), "lam": lam}
    torch.testing.assert_close(fb.Smoothed(rank=7, alpha=7.0).forward(both, x, Base(W)), over, rtol=1e-5, atol=1e-5)
    forgotten = both | {"A": torch.cat([p["A"], q["A"]])}
    assert (fb.Smoothed(rank=7, alpha=7.0).forward(forgotten, x, Base(W)) - over).abs().max() > 1


def test_inputs_and_columns_that_are_nothing() -> None:
    W, X, adapter = torch.randn(19, 43), torch.randn(90, 43), fb.Smoothed(rank=4, alpha=4.0)
    X[:, 5:9], W[:, 7:12] = 0, 0
    quantize = lambda V: fb.quantize(V, fb.NF(3, block=16))  # noqa: E731
    for stats in (seen(X, None, Gram), seen(torch.zeros(9, 43), None, Gram)):
        Q, p = SVDQuant()(W, adapter, quantize, stats)
        assert torch.isfinite(adapter.merged(p, Q)).all() and (p["lam"] > 0).all()
    Q, p = SVDQuant()(torch.zeros(19, 43), adapter, quantize, stats)
    assert not Q.dequantize().any() and p.keys() == {"lam"}
    with pytest.raises(ValueError, match="no parameter 'lam'"):
        fb.LoRA(rank=4).params(Base(W), torch.Generator(), p)
    with pytest.raises(ValueError, match="grid"):
        SVDQuant(grid=-1)


def test_a_calibrated_quantizer_is_given_the_inputs_that_the_smoothed_base_meets() -> None:
    """Over GPTQ: the codes are those of GPTQ on the Gram matrix of X / λ, gathered anew, and of the columns times λ."""
    X, W, adapter = inputs(200, 40), torch.randn(24, 40), fb.Smoothed(rank=4, alpha=9.0)
    gptq, format, stats = fb.GPTQ(), fb.Int(3, block=20, symmetric=False), seen(X, None, Gram)
    Q, p = SVDQuant(grid=5, steps=0)(W, adapter, BoundQuantizer(gptq, format, stats), stats)
    lam = p["lam"].double()
    U, S, Vh = torch.linalg.svd(W.double() * lam)
    rest = W.double() * lam - U[:, :4] * S[:4] @ Vh[:4]
    wanted = gptq(rest.float(), format, seen((X.double() / lam).float(), None, Gram))
    assert lam.max() > 2 * lam.min() and (Q.codes() == wanted.codes()).float().mean() > 0.99
    unsmoothed = gptq(rest.float(), format, stats)
    assert (Q.codes() == unsmoothed.codes()).float().mean() < 0.95


@pytest.mark.parametrize("statistic", methods("stats"))
def test_smoothed_statistics_are_those_of_smoothed_inputs(statistic: type) -> None:
    """∂L/∂Ŵ with Ŵ = W diag(λ) is ∂L/∂W divided by λ, which Grad and FisherDiag say as well."""
    X, G, lam = torch.randn(30, 7), torch.randn(30, 5), torch.rand(7) + 0.5
    one, other = seen(X, G, statistic)[statistic].smoothed(lam), seen(X / lam, G, statistic)[statistic]
    torch.testing.assert_close(one.value(), other.value(), rtol=1e-4, atol=1e-5)
    assert one.tokens == other.tokens
