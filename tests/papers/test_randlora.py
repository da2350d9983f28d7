"""RandLoRA (arXiv:2502.00987) against stock PEFT with the same tensors; its rank, its counts, what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import finebits as fb
from finebits.adapters.base import Base
from papers.kept import kept

peft = pytest.importorskip("peft")
R = 4
SHAPES = [(19, 13), (13, 19), (13, 13)]  # none of which r divides


def stock(m: int, n: int) -> Any:
    torch.manual_seed(0)
    config = peft.RandLoraConfig(r=R, randlora_alpha=8, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(n, m)), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "randlora_lambda" in name or "randlora_gamma" in name:
                p.copy_(torch.randn_like(p))
    return model.base_model.model[0]


def theirs_here(layer: Any) -> dict[str, Tensor]:
    """PEFT pairs the columns of its flat B (N, r) with the rows of its flat scaled A (r, N): column i·N + j is column i of B_j."""
    lam, gamma = (getattr(layer, f"randlora_{k}")["default"] for k in ("lambda", "gamma"))
    B = layer.randlora_B["default"]
    B = B.flatten(1).unflatten(1, lam.shape).mT.flatten(1)
    return {"A": layer.randlora_A["default"][:, 0], "B": B, "lam": lam.detach().clone(), "gamma": gamma.detach().clone()}


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_forward_and_gradients_are_pefts(m: int, n: int) -> None:
    layer, adapter = stock(m, n), fb.RandLoRA(basis=R, alpha=8.0)
    p = theirs_here(layer)
    assert {k: tuple(v.shape) for k, v in p.items()} == adapter.shapes(m, n)
    trained = {k: p[k].requires_grad_() for k in ("lam", "gamma")}
    x, y = (x.requires_grad_() for x in [torch.randn(2, 5, n)] * 2)
    base = Base(layer.base_layer.weight, layer.base_layer.bias)
    want, got = layer(y), adapter.forward(p, x, base)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    g = torch.randn_like(want)
    mine = torch.autograd.grad(got, (x, *trained.values()), g)
    their = torch.autograd.grad(want, (y, layer.randlora_lambda["default"], layer.randlora_gamma["default"]), g)
    for one, other in zip(mine, their, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)
    update = adapter.merged(p, base.weight) - base.weight
    torch.testing.assert_close(update, layer.get_delta_weight("default"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_update_is_the_papers_sum_and_of_full_rank(m: int, n: int) -> None:
    adapter, k = fb.RandLoRA(basis=R, alpha=8.0), min(m, n)
    base = Base(torch.zeros(m, n, dtype=torch.float64))
    p = {name: v.double() for name, v in adapter.params(base, torch.Generator().manual_seed(0), {}).items()}
    p |= {name: torch.randn_like(p[name]) for name in ("lam", "gamma")}
    N = len(p["gamma"])
    terms = [p["B"][:, R * j : R * (j + 1)] @ torch.diag(p["lam"][:, j]) @ p["A"] @ torch.diag(p["gamma"][j]) for j in range(N)]
    D = 2.0 * sum(terms)
    torch.testing.assert_close(adapter.merged(p, base.weight), D if m >= n else D.mT)
    assert N == -(-k // R) and torch.linalg.matrix_rank(D, rtol=1e-8) == k


def test_at_birth_the_gradient_is_lambdas_alone() -> None:
    adapter, base = fb.RandLoRA(basis=R), Base(torch.randn(19, 13))
    p = adapter.params(base, torch.Generator().manual_seed(0), {})
    p |= {k: p[k].requires_grad_() for k in ("lam", "gamma")}
    adapter.forward(p, torch.randn(8, 13), base).square().sum().backward()
    assert p["lam"].grad.abs().min() > 0 and not p["gamma"].grad.any()


@pytest.mark.parametrize(("bases", "some"), [("dense", None), ("sparse", 1 / 3), ("very_sparse", 1 / 20)])
def test_bases_have_deviation_one(bases: Any, some: float | None) -> None:
    p = fb.RandLoRA(basis=8, bases=bases).params(Base(torch.zeros(500, 400)), torch.Generator().manual_seed(0), {})
    for k in "AB":
        assert float(p[k].std()) == pytest.approx(1.0, rel=0.1) and float(p[k].mean()) == pytest.approx(0.0, abs=0.05)
        if some is not None:
            assert float((p[k] != 0).float().mean()) == pytest.approx(some, rel=0.15) and len(p[k].unique()) == 3


@pytest.mark.parametrize(("m", "n"), [(48, 32), (32, 48)])
def test_no_base_is_kept_but_what_goes_through_them(m: int, n: int) -> None:
    """k numbers a token: inputs of a tall weight, what comes out of the first product of a wide one. PEFT keeps k·k of all scaled bases too."""
    adapter, W, x = fb.RandLoRA(basis=R), torch.randn(m, n), torch.randn(10, n)
    p = {k: torch.randn(s).requires_grad_(k not in adapter.frozen) for k, s in adapter.shapes(m, n).items()}
    assert kept(lambda: adapter.forward(p, x * 1.0, Base(W)), [*p.values(), W]) == 4 * 10 * 32


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_under_a_transform_it_is_the_same(m: int, n: int) -> None:
    adapter, base, x = fb.RandLoRA(basis=R), Base(torch.randn(m, n)), torch.randn(3, 5, n)
    p = adapter.params(base, torch.Generator().manual_seed(0), {}) | {"lam": torch.randn(adapter.shapes(m, n)["lam"])}
    torch.testing.assert_close(vmap(lambda x: adapter.forward(p, x, base))(x), adapter.forward(p, x, base), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("setting", "value"), [("basis", 0), ("bases", "ternary")])
def test_a_setting_without_meaning_is_refused(setting: str, value: Any, unchecked: None) -> None:
    with pytest.raises(ValueError, match=setting):
        fb.RandLoRA(**{setting: value})
