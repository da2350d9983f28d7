"""Bottleneck adapters (arXiv:1902.00751v2, 2005.00247v3, 2110.04366v3, 2406.06820v1)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import finebits as fb
import tiny_llama
from finebits.adapters.base import Base
from finebits.export._peft import portable
from finebits.store import apply, read


def born(adapter: fb.Bottleneck, base: Base) -> dict[str, torch.Tensor]:
    return adapter.params(base, torch.Generator().manual_seed(0), {})


def test_the_published_counts() -> None:
    """BERT-base: Houlsby with 64 units after both sublayers, 2.16 % of 110 M; Pfeiffer with 48 after the feed-forward."""
    d, layers = 768, 12
    houlsby, pfeiffer = fb.Bottleneck(reduction=12), fb.Bottleneck(reduction=16, activation="relu")
    assert layers * (houlsby.size(d, d) + houlsby.size(d, 4 * d)) == 2_379_264
    assert layers * pfeiffer.size(d, 4 * d) == 894_528
    assert fb.Bottleneck(reduction=96, scaling="channels").size(d, 4 * d) == 2 * d * 8 + 8 + d + d


def test_a_parallel_one_that_does_not_bend_is_a_lora() -> None:
    base, x = Base(torch.randn(12, 20), torch.randn(12)), torch.randn(5, 20)
    adapter = fb.Bottleneck(position="parallel", activation="identity", reduction=5, scale=3.0)
    p = born(adapter, base)
    lora = fb.LoRA(rank=4, alpha=12.0)
    torch.testing.assert_close(adapter.forward(p, x, base), lora.forward({"A": p["down"], "B": p["up"]}, x, base), rtol=1e-6, atol=1e-6)


def test_a_serial_one_is_a_residual_layer_after_the_linear() -> None:
    linear, down, up = nn.Linear(20, 12), nn.Linear(12, 3), nn.Linear(3, 12)
    adapter = fb.Bottleneck(activation="relu", reduction=4, scale=0.5)
    p = {"down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias}
    x = torch.randn(5, 20)
    y = linear(x)
    torch.testing.assert_close(adapter.forward(p, x, Base(linear.weight, linear.bias)), y + 0.5 * up(torch.relu(down(y))))


def test_at_birth_houlsby_is_near_the_identity_and_zero_up_is_it() -> None:
    base, x = Base(torch.randn(64, 64) / 8), torch.randn(9, 64)
    p = born(fb.Bottleneck(reduction=2), base)
    assert p["down"].abs().max() <= 0.02 and 0.008 < p["down"].std() < 0.01  # N(0, .01²), cut at two deviations
    off = fb.Bottleneck(reduction=2).forward(p, x, base) - base(x)
    assert 0 < off.norm() < 0.01 * base(x).norm()
    zero = fb.Bottleneck(reduction=2, start="zero_up")
    assert torch.equal(zero.forward(born(zero, base), x, base), base(x))


@pytest.mark.parametrize("bits", [4, 2])
def test_it_trains_beside_a_packed_llama_and_comes_back(bits: int, tmp_path: Path) -> None:
    names = tiny_llama.names(linears=("self_attn.o_proj", "mlp.down_proj"))
    spec = fb.Spec(fb.NF(bits, block=32), adapter=fb.Bottleneck(reduction=8, start="zero_up"))
    plan = fb.Plan(dict.fromkeys(names, spec), levers=fb.Levers(dtype="float32"))
    model = fb.build(tiny_llama.fresh(), plan)
    before = copy.deepcopy(model.state_dict())
    batch = tiny_llama.batches()[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = fb.train(model, [[batch]] * 6, torch.optim.AdamW(trained, 1e-2), total=6)
    assert losses[-1] < losses[0] - 0.02
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k, p in model.named_parameters() if p.requires_grad}
    fb.save(model, tmp_path / "saved")
    again = apply(tiny_llama.fresh(), read(tmp_path / "saved"))
    assert torch.equal(tiny_llama.logits(again.eval()), tiny_llama.logits(model.eval()))
    with pytest.raises(ValueError, match="Bottleneck cannot be exported as plain LoRA because it depends on its input"):
        portable(model)


@pytest.mark.usefixtures("unchecked")
def test_a_bottleneck_without_units_or_of_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no unit for 12 inputs: take a reduction of 12 or less"):
        fb.Bottleneck(reduction=16).size(12, 20)
    with pytest.raises(ValueError, match="position of bottleneck is 'before'"):
        fb.Bottleneck(position="before")  # type: ignore[arg-type]
