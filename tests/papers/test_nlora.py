"""NLoRA: a start from rows and columns, against NumPy in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import finebits as fb
from finebits.init.nlora import NLoRA
from finebits.qtensor import dense
from golden.values import golden

SLORA = fb.SLoRA(rank=7, alpha=20.0)


def relative(V: torch.Tensor, W: torch.Tensor) -> float:
    return float((V - W).norm() / W.norm())


def test_the_middle_is_the_papers_the_codes_or_the_best() -> None:
    W = torch.randn(37, 53)
    w = W.double().numpy()
    C, R, corner = w[:, :7], w[:7], w[:7, :7]
    best = np.linalg.lstsq(np.kron(C, R.T), w.reshape(-1), rcond=None)[0].reshape(7, 7)  # vec(C N R), row by row
    for middle, N in (("pinv", np.linalg.inv(corner)), ("corner", corner), ("fit", best)):
        _, p = NLoRA(middle)(W, SLORA, lambda V: V, {})  # type: ignore[arg-type]
        np.testing.assert_allclose(SLORA.s * p["N"].double().numpy(), N, rtol=2e-3, atol=2e-3)
        assert torch.equal(p["B"], W[:, :7]) and torch.equal(p["A"], W[:7])


def test_a_weight_of_that_rank_is_taken_out_whole() -> None:
    W = torch.randn(37, 7) @ torch.randn(7, 53)
    for middle in ("pinv", "fit"):
        base, p = NLoRA(middle)(W, SLORA, lambda V: V, {})  # type: ignore[arg-type]
        assert relative(SLORA.merged(p, torch.zeros_like(W)), W) < 1e-3 and float(base.norm() / W.norm()) < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_quantized_base_keeps_the_weight(bits: int) -> None:
    """What the default start adds to the error of quantizing alone, and that the paper's is refused where it would ruin it."""
    W, adapter = 0.02 * torch.randn(192, 256), fb.SLoRA(rank=16, alpha=48.0)
    quantize = lambda V: fb.quantize(V, fb.NF(bits))  # noqa: E731
    base, p = NLoRA()(W, adapter, quantize, {})
    assert relative(adapter.merged(p, dense(base)), W) <= relative(dense(quantize(W)), W)
    with pytest.raises(ValueError, match=r"leaves \d.* times the weight's norm to quantize.*middle='fit'"):
        NLoRA("pinv")(W, adapter, quantize, {})
    with pytest.raises(Exception, match="middle"):
        NLoRA("best")  # type: ignore[arg-type]


def test_the_authors_factors_but_for_the_adapters_scale_and_the_base() -> None:
    """They add s·B N A to a weight that they leave as it is; here B N A, whatever s is, is taken out of it."""
    theirs, adapter = golden("nlora"), fb.SLoRA(rank=5, alpha=8.0)
    base, p = NLoRA("corner")(theirs["W"], adapter, lambda V: V, {})
    assert torch.equal(p["A"], theirs["A"]) and torch.equal(p["B"], theirs["B"])
    torch.testing.assert_close(adapter.s * p["N"], theirs["N"], rtol=0, atol=1e-6)
    torch.testing.assert_close(adapter.merged(p | {"N": theirs["N"]}, torch.zeros(24, 40)), theirs["update"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.s * (theirs["W"] - base), theirs["update"], rtol=1e-5, atol=1e-4)
    assert torch.equal(theirs["base"], theirs["W"])
