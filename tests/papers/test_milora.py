"""MiLoRA: the minor part moves into the adapter."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.init.milora import MiLoRA
from golden.values import golden, signed


@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
def test_the_adapter_holds_the_smallest_triples(shape: tuple[int, int]) -> None:
    W, adapter = torch.randn(shape), fb.LoRA(rank=4, alpha=14.0)
    base, p = MiLoRA()(W, adapter, lambda V: V, {})
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(torch.linalg.svdvals(adapter.s * p["B"] @ p["A"])[:4], S[-4:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.linalg.svdvals(base), torch.cat([S[:-4], torch.zeros(4)]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.merged(p, base), W, rtol=1e-5, atol=1e-5)


def test_the_authors_factors() -> None:
    """Their alpha is the rank. Signs of singular vectors are free."""
    theirs = golden("milora")
    base, p = MiLoRA()(theirs["W"], fb.LoRA(rank=5, alpha=5.0), lambda V: V, {})
    sign = signed(p["A"], theirs["A"])
    torch.testing.assert_close(sign[:, None] * p["A"], theirs["A"], rtol=0, atol=1e-5)
    torch.testing.assert_close(sign * p["B"], theirs["B"], rtol=0, atol=1e-5)
    torch.testing.assert_close(base, theirs["W"] - theirs["taken"], rtol=0, atol=1e-5)
