"""LoRA-FA (arXiv:2308.03303): LoRA whose A stays, and what that saves."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.adapters.base import Base
from papers.kept import kept


def test_it_is_lora_of_which_a_has_no_gradient() -> None:
    lora, fa, base, x = fb.LoRA(rank=4, alpha=6.0), fb.LoRAFA(rank=4, alpha=6.0), Base(torch.randn(13, 21)), torch.randn(7, 21)
    p = {"A": torch.randn(4, 21), "B": torch.randn(13, 4)}
    born = [a.params(base, torch.Generator().manual_seed(3), {}) for a in (lora, fa)]
    assert all(torch.equal(born[0][k], born[1][k]) for k in p)
    grads = []
    for adapter in (lora, fa):
        q = {k: v.clone().requires_grad_(k not in adapter.frozen) for k, v in p.items()}
        adapter.forward(q, x, base).square().sum().backward()
        grads.append(q["B"].grad)
    assert torch.equal(*grads) and q["A"].grad is None


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("over", [False, True], ids=["plain", "dropout"])
def test_of_the_tokens_r_numbers_each_are_kept(quantized: bool, over: bool) -> None:
    W, t, r = torch.randn(32, 64), 50, 4
    W = fb.quantize(W, fb.NF(4)) if quantized else W
    x, base = torch.randn(t, 64, requires_grad=True), Base(W, None, (lambda z: z * 2) if over else Base(W).drop)
    bytes_ = {}
    for adapter in (fb.LoRA(rank=r), fb.LoRAFA(rank=r)):
        p = {k: torch.randn(s).requires_grad_(k not in adapter.frozen) for k, s in adapter.shapes(32, 64).items()}
        there = [*p.values(), x, *(W.parts.values() if quantized else [W])]
        bytes_[type(adapter)] = kept(lambda: adapter.forward(p, x * 1.0, base), there)  # noqa: B023
    assert bytes_[fb.LoRAFA] == 4 * t * r
    assert bytes_[fb.LoRA] == 4 * t * (r + 64)
