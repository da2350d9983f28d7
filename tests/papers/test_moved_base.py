"""A base that was quantized before is never rounded again: what an initialiser takes out of it lies over the untouched codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finebits as fb
from finebits import registry
from finebits.build import MOVED
from finebits.plan.base import Plan, Spec
from finebits.qtensor import QTensor
from finebits.stats.fisher_diag import FisherDiag
from finebits.stats.grad import Grad
from finebits.stats.gram import Gram
from papers.gram import seen

INITS = [registry.load("init", name)() for name in registry.names("init")]


def quantized(m: int = 24, n: int = 40) -> nn.Sequential:
    linear = nn.Linear(n, m)
    W = fb.quantize(torch.randn(m, n), fb.NF(3, block=16))
    linear.weight = nn.Parameter(W, requires_grad=False)
    return nn.Sequential(linear)


@pytest.mark.parametrize("init", INITS, ids=str)
@pytest.mark.parametrize("format", [None, fb.NF(3, block=16)], ids=["none", "its own"])
def test_codes_stay_and_the_start_is_the_weight(init, format) -> None:  # noqa: ANN001
    model, x = quantized(), torch.randn(5, 40)
    W, y = model[0].weight.dequantize(), model(x)
    codes = model[0].weight.codes()
    stats = {"0": seen(torch.randn(90, 40), torch.randn(90, 24), Gram, Grad, FisherDiag)}
    for adapter in (
        fb.LoRA(rank=4, alpha=10.0),
        fb.Gated(rank=4, alpha=10.0),
        fb.LoRAXS(rank=4, alpha=10.0),
        fb.SLoRA(rank=4, alpha=10.0),
        fb.Smoothed(rank=4, alpha=10.0),
        fb.DoRA(rank=4, alpha=10.0),
    ):
        try:
            host = fb.build(quantized_like(model), Plan({"0": Spec(format=format, adapter=adapter, init=init)}), stats)[0]
        except ValueError as e:
            assert "no parameter" in str(e) or "factors of its own" in str(e)
            continue
        assert isinstance(host.weight, QTensor) and torch.equal(host.weight.codes(), codes)
        if init.exact:
            torch.testing.assert_close(host(x), y, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(host.stack().weight, W, rtol=1e-4, atol=1e-4)
        trained = {k for k, p in host.named_parameters() if p.requires_grad}
        assert trained and not any(MOVED in k for k in trained)
        if init.moves and init.exact:
            assert host.active == [MOVED, "default"]


def quantized_like(model: nn.Sequential) -> nn.Sequential:
    new = nn.Sequential(nn.Linear(*reversed(model[0].weight.shape)))
    new[0].weight = nn.Parameter(model[0].weight.apply_parts(torch.clone), requires_grad=False)
    new[0].bias.data = model[0].bias.data.clone()
    return new


def test_the_move_and_the_start_cancel_and_dropout_spares_the_move() -> None:
    model, x = quantized(), torch.randn(50, 40)
    y = model(x)
    host = fb.build(model, Plan({"0": Spec(adapter=fb.LoRA(rank=4, alpha=10.0), init=fb.PiSSA())}))[0]
    p = host.p
    assert torch.equal(p[MOVED]["A"], p["default"]["A"]) and torch.equal(p[MOVED]["B"], -2.5 * p["default"]["B"])
    host.dropout = 1.0
    moved = torch.nn.functional.linear(torch.nn.functional.linear(x, p[MOVED]["A"]), p[MOVED]["B"])
    torch.testing.assert_close(host.train()(x), y + moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("init", "adapter"),
    [("pissa", fb.LoRA(rank=3, alpha=7.0)), ("lora_ga", fb.LoRA(rank=3, alpha=7.0)), ("kasa", fb.Gated(rank=3, alpha=7.0))],
    ids=str,
)
def test_export_is_the_trained_minus_the_start_over_the_untouched_codes(init: str, adapter) -> None:  # noqa: ANN001
    from finebits.export._peft import portable

    model, x = quantized(), torch.randn(6, 40)
    base = quantized_like(model)
    stats = {"0": seen(torch.randn(90, 40), torch.randn(90, 24), Grad)}
    fb.build(model, Plan({"0": Spec(adapter=adapter, init=registry.load("init", init)())}), stats)
    with torch.no_grad():
        model[0].p["default"]["B"].add_(torch.randn(24, 3))
    rank, products = portable(model)
    L, R = products["0"]
    assert rank == 6
    torch.testing.assert_close(base(x) + x @ R.mT @ L.mT, model(x), rtol=1e-4, atol=1e-4)
    model[0].active = []
    assert torch.equal(model(x), base(x)), "with its adapters off it is the base that came"


def test_a_saved_model_comes_back(tmp_path) -> None:  # noqa: ANN001
    from finebits import store

    model, x = quantized(), torch.randn(6, 40)
    fb.build(model, Plan({"0": Spec(adapter=fb.LoRA(rank=3, alpha=7.0), init=fb.PiSSA())}))
    y = model(x)
    store.save(model, tmp_path / "saved")
    again = store.apply(nn.Sequential(nn.Linear(40, 24)), store.read(tmp_path / "saved"))
    again[0].bias.data = model[0].bias.data
    assert torch.equal(again(x), y)
    assert {k for k, p in again.named_parameters() if p.requires_grad} == {"0.p.default.A", "0.p.default.B"}


def test_another_format_would_round_it_again_and_is_refused() -> None:
    with pytest.raises(ValueError, match="quantized already"):
        fb.build(quantized(), Plan({"0": Spec(format=fb.NF(4), adapter=fb.LoRA(rank=4))}))
