"""QPiSSA: the principal part first, then the rest is quantized."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.init.qpissa import QPiSSA
from golden.values import golden


def spectrum(power: float, size: int = 256) -> torch.Tensor:
    U, V = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    return U * torch.arange(1.0, size + 1) ** -power @ V


def nuclear(M: torch.Tensor) -> float:
    return float(torch.linalg.svdvals(M).sum())


def test_a_decaying_spectrum_gains_and_gains_more_with_more_steps() -> None:
    W, adapter = spectrum(1.0), fb.LoRA(rank=16, alpha=64.0)
    quantize = lambda V: fb.quantize(V, fb.NF(4))  # noqa: E731
    plain = nuclear(W - quantize(W).dequantize())
    one, five = (nuclear(W - adapter.merged(p, Q)) for Q, p in (QPiSSA(steps=t)(W, adapter, quantize, {}) for t in (1, 5)))
    assert five < one < 0.5 * plain


def test_codes_are_those_of_the_rest() -> None:
    W, adapter = torch.randn(21, 50), fb.LoRA(rank=3, alpha=6.0)
    quantize = lambda V: fb.quantize(V, fb.NF(3, block=16))  # noqa: E731
    Q, p = QPiSSA(steps=1)(W, adapter, quantize, {})
    U, S, Vh = torch.linalg.svd(W)
    principal = U[:, :3] * S[:3] @ Vh[:3]
    torch.testing.assert_close(adapter.s * p["B"] @ p["A"], principal, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Q.dequantize(), quantize(W - principal).dequantize(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [0, -2])
def test_no_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        QPiSSA(steps=steps)


def test_the_authors_loop() -> None:
    """Every step gains here, so that their last iterate is the best."""
    theirs, lora = golden("qpissa"), fb.LoRA(rank=4, alpha=10.0)
    Q, p = QPiSSA(steps=3)(theirs["W"], lora, lambda V: fb.quantize(V, fb.NF(4, block=64)), {})
    torch.testing.assert_close(Q.dequantize(), theirs["Q"], rtol=0, atol=1e-5)
    torch.testing.assert_close(lora.s * p["B"] @ p["A"], theirs["LR"], rtol=0, atol=1e-4)
