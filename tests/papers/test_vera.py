"""VeRA (arXiv:2310.11454) against stock PEFT with the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finebits as fb
from finebits.adapters.base import Base
from papers.kept import kept

peft = pytest.importorskip("peft")
M, N, R = 13, 22, 6


def stock() -> nn.Module:
    """Two linears, the other one larger on both sides: PEFT's A and B are as large as the larger and cut for the smaller."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M), nn.Linear(M, N + 5))
    model = peft.get_peft_model(model, peft.VeraConfig(r=R, target_modules=["0", "1"], projection_prng_key=3))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lambda" in name:
                p.copy_(torch.randn_like(p))
    return model.base_model.model[0]


def test_forward_and_gradients_are_pefts() -> None:
    theirs = stock()
    p = {"A": theirs.vera_A["default"][:, :N], "B": theirs.vera_B["default"][:M]}
    p |= {k: getattr(theirs, f"vera_lambda_{k}")["default"].detach().clone().requires_grad_() for k in "bd"}
    x, base = torch.randn(5, N), Base(theirs.base_layer.weight, theirs.base_layer.bias)
    want, got = theirs(x), fb.VeRA(rank=R).forward(p, x, base)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(want)
    want.backward(g)
    got.backward(g)
    for k in "bd":
        torch.testing.assert_close(p[k].grad, getattr(theirs, f"vera_lambda_{k}")["default"].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        fb.VeRA(rank=R).merged(p, base.weight) - base.weight, theirs.get_delta_weight("default"), rtol=1e-4, atol=1e-5
    )


def test_birth_is_pefts() -> None:
    """b = 0, d = .1, and factors uniform in the same ranges."""
    p = fb.VeRA(rank=64).params(Base(torch.zeros(300, 200)), torch.Generator().manual_seed(0), {})
    assert not p["b"].any() and bool((p["d"] == 0.1).all())
    for k, fan in (("A", 200), ("B", 64)):
        theirs = peft.tuners.vera.model._kaiming_init(tuple(p[k].shape), torch.Generator().manual_seed(0))
        assert float(p[k].std()) == pytest.approx(float(theirs.std()), rel=0.02)
        assert p[k].abs().max() <= (6 / fan) ** 0.5


def test_of_the_tokens_r_numbers_each_are_kept() -> None:
    """PEFT's formula keeps the m outputs of B as well, for b's gradient; here diag(b) B diag(d) is kept, whatever the tokens."""
    adapter, W, x = fb.VeRA(rank=R), torch.randn(M, N), torch.randn(100, N)
    p = {k: torch.randn(s).requires_grad_(k not in adapter.frozen) for k, s in adapter.shapes(M, N).items()}
    few, many = (kept(lambda: adapter.forward(p, x[:t], Base(W)), [*p.values(), W]) for t in (50, 100))  # noqa: B023
    assert many - few == 4 * 50 * R


def test_a_birth_without_any_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="d_initial"):
        fb.VeRA(d_initial=0.0)
