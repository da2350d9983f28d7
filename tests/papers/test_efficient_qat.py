"""EfficientQAT: gradients by the authors' formulas, hardening without a difference, and what each of its stages moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama
from finebits import store
from finebits.build import hosts
from finebits.refine._latent import LatentWeight

FORMATS = [
    fb.Int(2, block=16, symmetric=False, scale="fp16"),
    fb.Int(2, block=16, symmetric=False, variant="integer", scale="fp16"),
    fb.Int(3, block=16),
    fb.Int(4, block=64, symmetric=False, variant="integer"),
    fb.Int(3, block="tensor", variant="full"),
]


def moved(format: Any, m: int = 6, n: int = 32) -> tuple[LatentWeight, torch.Tensor]:
    W = torch.randn(m, n)
    one = LatentWeight(fb.quantize(W, format), W)
    for p in one.tensors:
        p.data.normal_(std=0.2)
    one.latent[0].data += torch.randn(m, n)
    return one, W


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_hardened_codes_are_the_trained_forward(format: Any) -> None:
    one, _ = moved(format)
    new = one.packed()
    assert torch.equal(new.dequantize(), one.dense()) and not torch.equal(new.codes(), one.q.codes())
    assert {k: (p.shape, p.dtype) for k, p in new.parts.items()} == {k: (p.shape, p.dtype) for k, p in one.q.parts.items()}


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradients_are_straight_through(format: Any) -> None:
    """Eqs. 1 and 2 in double precision, rounding as the identity and clamping as it is, for what is stored exactly."""
    format = replace(format, scale="fp32")
    one, _ = moved(format)
    G = torch.randn(6, 32)
    (one.dense() * G).sum().backward()
    v, theta, *phi = (p.detach().double().requires_grad_() for p in (*one.latent, *one.tensors))
    spread = lambda t: format.spread(t, 32)  # noqa: E731
    through = lambda t, rounded: t + (rounded - t).detach()  # noqa: E731
    low0 = 0.0 if one.low is None else one.low.double()
    scale = one.scale.double() * theta.exp()
    zero: Any = 0.0
    if phi and format.form == "integer":
        zero = through(z := -low0 / one.scale.double() + phi[0], z.round().clamp(0, format.top))
    low = -scale * zero if format.form == "integer" else low0 + one.scale.double() * phi[0] if phi else torch.zeros_like(scale)
    w = v * spread(one.scale.double()) + (0.0 if one.low is None else spread(low0))
    u = (w - spread(low)) / spread(scale)
    q = through(u, u.round()).clamp(min(format.levels()), max(format.levels()))
    wanted = spread(scale) * q + spread(low)
    torch.testing.assert_close(one.dense().detach().double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    (wanted * G.double()).sum().backward()
    for p, reference in zip((*one.latent, *one.tensors), (v, theta, *phi), strict=True):
        torch.testing.assert_close(p.grad.double(), reference.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("quantizer", [fb.RTN(), fb.HQQ()], ids=str)
def test_it_starts_at_the_codes_of_any_quantizer(quantizer: Any) -> None:
    W = torch.randn(8, 64)
    q = fb.quantize(W, fb.Int(2, block=32, symmetric=False), quantizer)
    one = LatentWeight(q, W)
    assert one.packed() is q and torch.equal(one.dense(), q.dequantize())
    one.latent[0].data += 1e-3  # steps of the grid
    assert torch.equal(one.packed().codes(), q.codes())


def run(model: Any, batch: Any) -> torch.Tensor:
    return model.base_model(input_ids=batch, use_cache=False)[0]


def swept(
    refine: tuple, watch: Any = lambda name, losses: None, format: Any = fb.Int(2, 32, symmetric=False, scale="fp16"), **more: Any
) -> Any:
    gen = torch.Generator().manual_seed(3)
    text = [torch.randint(3, 128, (4, 24), generator=gen) for _ in range(4)]
    plan = tiny_llama.plan(format=format, init=fb.QERA(), **more)
    model = tiny_llama.fresh()
    return fb.sweep(model, plan, text, run, refine=refine, head=model.lm_head, watch=watch)


def test_blocks_then_the_model_come_nearer_and_only_blocks_change_codes(tmp_path: Path) -> None:
    told: dict[str, list[float]] = {}
    plain = swept(())
    blocks = swept((fb.EfficientQAT(epochs=4, lr=0.03),), told.__setitem__)
    both = swept((fb.EfficientQAT(epochs=4, lr=0.03), fb.EfficientQAT(epochs=3, scope="model", scales=5e-3)), told.__setitem__)
    assert set(told) == {"", "model.layers.0", "model.layers.1"}
    for name, losses in told.items():
        assert sum(losses[-4:]) < 0.97 * sum(losses[:4]), name
    for (name, a), (_, b), (_, c) in zip(hosts(plain), hosts(blocks), hosts(both), strict=True):
        codes = [h.weight.parts["codes"] for h in (a, b, c)]
        assert not torch.equal(codes[0], codes[1]) and torch.equal(codes[1], codes[2]), name
        assert not torch.equal(b.weight.parts["scale"], c.weight.parts["scale"]) and a.weight.nbytes == c.weight.nbytes
        assert all(torch.equal(p, c.p["default"][k]) for k, p in b.p["default"].items()), "adapters stay"
    assert [n for n, p in both.named_parameters() if p.requires_grad] == [n for n, p in plain.named_parameters() if p.requires_grad]
    fb.save(both, tmp_path / "a")
    back = store.apply(tiny_llama.fresh(), store.read(tmp_path / "a"))
    assert torch.equal(tiny_llama.logits(both), tiny_llama.logits(back))


def test_other_formats_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="EfficientQAT rounds weights to integers, and NF.* offer int, or take apiq with scales"):
        swept((fb.EfficientQAT(),), format=fb.NF(4))
    with pytest.raises(ValueError, match="Block-AP has the scope block"):
        fb.EfficientQAT(scope="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr above 0"):
        fb.EfficientQAT(lr=0.0)
