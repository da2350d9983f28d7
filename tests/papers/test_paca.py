"""PaCA and QPaCA (arXiv:2503.01905): columns of the weight, and nothing of the tokens but these."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finebits as fb
from finebits.adapters.base import Base, Params
from finebits.plan.base import Plan, Spec
from papers.kept import kept

PACA = fb.PaCA(rank=3, alpha=6.0)


def born(adapter: fb.PaCA, m: int, n: int) -> Params:
    base, gen = Base(torch.zeros(m, n)), torch.Generator().manual_seed(0)
    return adapter.params(base, gen, {}) | adapter.buffers(base, gen)


def test_the_gradient_is_that_of_the_columns_and_no_other_column_moves() -> None:
    W, b, x, y = torch.randn(11, 17), torch.randn(11), torch.randn(9, 17), torch.randn(9, 11)
    p = born(PACA, 11, 17)
    at = p["columns"][:3].long()
    D, whole = p["D"].requires_grad_(), W.clone().requires_grad_()
    (PACA.forward(p, x, Base(W, b)) - y).square().sum().backward()
    (F.linear(x, whole, b) - y).square().sum().backward()
    torch.testing.assert_close(D.grad, PACA.s * whole.grad[:, at], rtol=1e-4, atol=1e-4)
    moved = PACA.merged({**p, "D": torch.randn(11, 3)}, W) != W
    assert moved[:, at].all() and moved.sum() == 33


def test_the_authors_step_is_the_same_step() -> None:
    """They train P, which stands in for W[:, at]/s: after a step of SGD both weights are the same."""
    W, x, y, lr = torch.randn(11, 17), torch.randn(9, 17), torch.randn(9, 11), 1e-3
    p = born(PACA, 11, 17)
    at = p["columns"][:3].long()
    P = (W[:, at] / PACA.s).requires_grad_()
    (F.linear(x, W.index_copy(1, at, PACA.s * P)) - y).square().sum().backward()
    (PACA.forward({**p, "D": p["D"].requires_grad_()}, x, Base(W)) - y).square().sum().backward()
    theirs = W.index_copy(1, at, PACA.s * (P - lr * P.grad))
    ours = PACA.merged({**p, "D": p["D"] - lr * p["D"].grad}, W)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(ours, W)


@pytest.mark.parametrize("quantized", [False, True])
def test_of_the_tokens_r_numbers_each_are_kept(quantized: bool) -> None:
    """LoRA keeps its inputs, n numbers a token, and r more. Beside the tokens the places of r columns are kept."""
    m, n, t = 32, 64, 200
    W = torch.randn(m, n)
    W = fb.quantize(W, fb.NF(3)) if quantized else W
    x = torch.randn(t, n, requires_grad=True)

    def bytes_of(adapter: fb.PaCA | fb.LoRA, t: int) -> int:
        p = {k: torch.randn(s).requires_grad_() for k, s in adapter.shapes(m, n).items()}
        if isinstance(adapter, fb.PaCA):
            p["columns"] = torch.randperm(n).int()
        there = [*p.values(), x, *(W.parts.values() if isinstance(W, fb.QTensor) else [W])]
        return kept(lambda: adapter.forward(p, x[:t] * 1.0, Base(W)), there)

    for r in (4, 8):
        assert bytes_of(fb.PaCA(rank=r), t) - bytes_of(fb.PaCA(rank=r), t // 2) == 4 * (t // 2) * r
        assert bytes_of(fb.LoRA(rank=r), t) - bytes_of(fb.LoRA(rank=r), t // 2) == 4 * (t // 2) * (n + r)
        assert bytes_of(fb.PaCA(rank=r), t) == 4 * t * r + 8 * r


@pytest.mark.parametrize("quantized", [False, True])
def test_with_dropout_it_is_the_same_in_several_steps(quantized: bool) -> None:
    """Where every kept number is doubled: values and gradients are those of twice the scale."""
    W, x = torch.randn(11, 32), torch.randn(9, 32)
    W = fb.quantize(W, fb.NF(4, block=32)) if quantized else W
    found = []
    for adapter, drop in ((PACA, lambda z: 2 * z), (fb.PaCA(rank=3, alpha=12.0), Base(W).drop)):
        gen = torch.Generator().manual_seed(1)
        D, y = torch.randn(11, 3, generator=gen).requires_grad_(), x.clone().requires_grad_()
        out = adapter.forward({"D": D, "columns": torch.arange(31, -1, -1)}, y, Base(W, torch.ones(11), drop))
        out.square().sum().backward()
        found.append((out, D.grad, y.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_a_quantized_base_keeps_its_codes_and_the_columns_come_of_the_seed() -> None:
    def built(seed: int) -> nn.Module:
        torch.manual_seed(0)
        plan = Plan({k: Spec(fb.NF(4, block=16), adapter=PACA) for k in "01"}, seed=seed)
        return fb.build(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), plan)

    model, again, other = built(1), built(1), built(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(8, 32)).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.p.default.D", "1.p.default.D"}
    columns = lambda m, i: m[i].p["default"]["columns"]  # noqa: E731
    assert torch.equal(columns(model, 0), columns(again, 0)) and not torch.equal(columns(model, 0), columns(other, 0))
    assert not torch.equal(columns(model, 0), columns(model, 1))
    assert columns(model.bfloat16(), 0).dtype == torch.int32 and torch.equal(columns(model, 0), columns(again, 0))


def test_places_of_columns_survive_low_precision() -> None:
    """Beyond 256 bfloat16 holds no odd number."""
    torch.manual_seed(0)
    model = fb.build(nn.Sequential(nn.Linear(1000, 5)), Plan({"0": Spec(adapter=fb.PaCA(rank=40))}))
    with torch.no_grad():
        model[0].p["default"]["D"].normal_()
    x = torch.randn(3, 1000)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), model.float()(x), rtol=0.1, atol=1.5)
    p = model[0].tensors("default", torch.bfloat16)
    assert torch.equal(p["columns"], model[0].p["default"]["columns"])


def test_more_columns_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="PaCA trains 16 columns .rank., and a 20x12 weight has 12"):
        fb.PaCA(rank=16).size(20, 12)
