"""OLoRA: orthonormal columns from the QR decomposition."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.init.olora import OLoRA
from golden.values import golden


@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
@pytest.mark.parametrize("alpha", [4.0, 14.0])
def test_factors_are_those_of_the_decomposition(shape: tuple[int, int], alpha: float) -> None:
    W, adapter = torch.randn(shape), fb.LoRA(rank=4, alpha=alpha)
    base, p = OLoRA()(W, adapter, lambda V: V, {})
    torch.testing.assert_close(adapter.s * p["B"].mT @ p["B"], torch.eye(4), rtol=1e-5, atol=1e-5)
    assert not p["A"].tril(-1).any()
    torch.testing.assert_close(base[:, :4], torch.zeros(shape[0], 4), rtol=0, atol=1e-5)  # the first r columns are inside
    torch.testing.assert_close(adapter.merged(p, base), W, rtol=1e-5, atol=1e-5)


def test_the_factors_of_peft_but_for_the_adapters_scale() -> None:
    """PEFT takes s·Q R out of the weight, this Q R whatever s is."""
    theirs, adapter = golden("olora"), fb.LoRA(rank=5, alpha=8.0)
    W, QR = theirs["W"], theirs["B"] @ theirs["A"]
    base, p = OLoRA()(W, adapter, lambda V: V, {})
    torch.testing.assert_close(adapter.s**0.5 * p["A"], theirs["A"], rtol=0, atol=1e-5)
    torch.testing.assert_close(adapter.s**0.5 * p["B"], theirs["B"], rtol=0, atol=1e-5)
    torch.testing.assert_close(base, W - QR, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs["base"], W - adapter.s * QR, rtol=0, atol=1e-5)
