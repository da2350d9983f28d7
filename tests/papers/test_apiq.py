"""ApiQ with scales or clipping that learn: gradients in every format, what they can mend and what not, and what of a weight stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
import tiny_llama
from finebits import store
from finebits.build import hosts
from finebits.formats._stores import Double
from finebits.formats.base import Scales
from finebits.qtensor import QTensor
from finebits.refine._scales import ClippedWeight, ScaledWeight
from finebits.refine.base import Matching

FORMATS = [
    fb.Int(3, block=16),
    fb.Int(2, block=16, symmetric=False),
    fb.Int(3, block=16, symmetric=False, variant="integer", scale="fp16"),
    fb.Int(4, block="tensor", scale="bf16"),
    fb.NF(3, block=16, unit=24, scale="bf16"),
    fb.NF(4, block=16, scale="double"),
    fb.NF(2, block=16, scale="clustered"),
    fb.Median(2, block="row"),
    fb.MXFP4(),
    fb.NVFP4(),
    fb.VQ(M=2, K=16, g=4),
]


def as_a_function_of_scales(q: QTensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """The weight by the format's own decoding; an integer zero point moves with the scale."""
    if "zero" in q.parts:
        shift = -scale * q.parts["zero"].float()
    return q.format.decode(q.codes(), Scales(scale, shift, q.parts.get("book")))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_scales_learn_in_every_format_and_what_learns_is_what_is_stored(format: Any) -> None:
    q = fb.quantize(torch.randn(12, 56), format)
    scaled, G = ScaledWeight(q), torch.randn(12, 56)
    (scaled.dense() * G).sum().backward()
    held = format.scales(scaled.q.format.rescaled(q.parts, scaled.scale, scaled.shift), 56)
    s = held.scale.float().clone().requires_grad_()
    shift = held.shift.float().clone().requires_grad_() if "shift" in q.parts else None  # type: ignore[union-attr]
    (as_a_function_of_scales(q, s, shift) * G).sum().backward()
    torch.testing.assert_close(scaled.tensors[0].grad, s.grad * scaled.scale, rtol=1e-4, atol=1e-4)
    assert len(scaled.tensors) == (1 if shift is None else 2)
    if shift is not None:
        torch.testing.assert_close(scaled.tensors[1].grad, shift.grad * scaled.scale, rtol=1e-4, atol=1e-4)
    assert scaled.packed() is q
    for p in scaled.tensors:
        p.data.normal_(std=0.3)
    new = scaled.packed()
    assert torch.equal(new.dequantize(), scaled.dense()) and not torch.equal(new.dequantize(), q.dequantize())
    changed = {k for k, part in q.parts.items() if not torch.equal(part, new.parts[k])}
    assert "scale" in changed and changed <= {k for k in q.parts if k.startswith("scale") or k == "shift"}
    assert {k: (p.shape, p.dtype) for k, p in new.parts.items()} == {k: (p.shape, p.dtype) for k, p in q.parts.items()}


def learned(q: QTensor, goal: torch.Tensor, epochs: int = 60) -> list[float]:
    scaled, x = ScaledWeight(q), torch.randn(64, q.shape[1])
    task = Matching(lambda i: (x @ scaled.dense().mT)[None], lambda i: (x @ goal.mT)[None], [], 4, scales=scaled.tensors)
    return fb.ApiQ(epochs=epochs, scales=0.03)(task)


def test_other_scales_are_found_and_a_low_rank_shift_is_not() -> None:
    """What scales alone can and cannot say: section 2 of PEQA."""
    q = fb.quantize(torch.randn(16, 64), fb.Int(3, block=32))
    other = ScaledWeight(q)
    other.tensors[0].data.normal_(std=0.2)
    losses = learned(q, other.dense().detach())
    assert losses[-1] < 1e-4 * losses[0]
    shift = 0.3 * torch.randn(16, 4) @ torch.randn(4, 64) / 2
    losses = learned(q, q.dequantize() + shift)
    assert losses[-1] > 0.6 * losses[0]


CLIPPED = [
    fb.Int(3, block=16),
    fb.Int(2, block=16, symmetric=False),
    fb.Int(3, block=16, symmetric=False, variant="integer"),
    fb.NF(3, block=16),
    fb.FP4(block=16),
]


@pytest.mark.parametrize("format", CLIPPED, ids=str)
def test_clipping_learns_by_straight_through_rounding(format: Any) -> None:
    """Against autograd in double precision, block by block, with shares of max w and min w as thresholds."""
    W, G = torch.randn(3, 32), torch.randn(3, 32)
    one = ClippedWeight(fb.quantize(W, format), W)
    torch.testing.assert_close(one.dense(), one.q.dequantize())  # nothing is clipped yet
    for p in one.tensors:
        p.data = torch.rand(p.shape) * 2 - 0.5  # far from open, so that much is clipped
    dense = one.dense()
    (dense * G).sum().backward()
    op = lambda x: torch.sigmoid(x) / torch.sigmoid(torch.tensor(4.0, dtype=torch.float64))  # noqa: E731
    levels, integer = torch.tensor(format.levels(), dtype=torch.float64), getattr(format, "form", "") == "integer"
    span = levels.max() - levels.min() if len(one.tensors) == 2 else torch.tensor(format.peak, dtype=torch.float64)
    logits = [p.detach().double().requires_grad_() for p in one.tensors]
    rows = []
    for i in range(3):
        for k in range(2):
            w = W[i, 16 * k : 16 * k + 16].double()
            if len(logits) == 1:
                s, low = op(logits[0][i, k]) * w.abs().max() / span, torch.tensor(0.0, dtype=torch.float64)
            else:
                low = op(logits[1][i, k]) * (w.min().clamp(max=0) if integer else w.min())
                s = (op(logits[0][i, k]) * (w.max().clamp(min=0) if integer else w.max()) - low) / span
            if integer:
                low = -s * (-low / s).round().detach()
            u = (w - low) / s
            nearest = levels[(u[:, None] - levels).abs().argmin(1)]
            inside = (u >= levels.min()) & (u <= levels.max())
            rows.append(s * torch.where(inside, u + (nearest - u).detach(), nearest) + low)
    wanted = torch.stack(rows).reshape(3, 32)
    torch.testing.assert_close(dense.detach().double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    (wanted * G.double()).sum().backward()
    for p, reference in zip(one.tensors, logits, strict=True):
        torch.testing.assert_close(p.grad.double(), reference.grad, rtol=1e-3, atol=1e-4)
    assert torch.equal(one.packed().dequantize(), dense)


def run(model: Any, batch: Any) -> torch.Tensor:
    return model.base_model(input_ids=batch, use_cache=False)[0]


def text(count: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    return [torch.randint(3, 128, (4, 24), generator=gen) for _ in range(count)]


def swept(refine: tuple, format: Any, dtype: str, watch: Any = lambda name, losses: None, quantizer: Any = None) -> Any:
    plan = tiny_llama.plan(format=format, init=fb.QERA(), dtype=dtype)
    plan = replace(plan, modules={n: replace(s, quantizer=quantizer or fb.GPTQ()) for n, s in plan.modules.items()})
    return fb.sweep(tiny_llama.fresh(dtype=getattr(torch, dtype)), plan, text(4), run, refine=refine, watch=watch)


@pytest.mark.parametrize(
    ("format", "dtype"), [(fb.Int(2, 32, symmetric=False, scale="bf16"), "bfloat16"), (fb.NF(2, 16, Double(8, 4)), "float32")], ids=str
)
def test_every_block_comes_nearer_than_by_its_adapters_alone_and_codes_stay(format: Any, dtype: str, tmp_path: Path) -> None:
    alone, both = fb.ApiQ(epochs=3, lr=2e-3), fb.ApiQ(epochs=3, lr=2e-3, scales=5e-3)
    plain, told = swept((), format, dtype), [dict[str, list[float]](), dict[str, list[float]]()]
    _, model = (swept((r,), format, dtype, t.__setitem__) for r, t in zip((alone, both), told, strict=True))
    for name in told[0]:
        assert sum(told[1][name][-4:]) < 0.98 * sum(told[0][name][-4:]), name
    for (name, a), (_, b) in zip(hosts(plain), hosts(model), strict=True):
        if ".0." in name:  # what the second block's codes are depends on what the first has become
            assert torch.equal(a.weight.parts["codes"], b.weight.parts["codes"])
        assert isinstance(b.weight, nn.Parameter) and not b.weight.requires_grad and b.weight.nbytes == a.weight.nbytes
        assert not torch.equal(a.weight.parts["scale"], b.weight.parts["scale"])
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not any(h._forward_hooks or h._forward_pre_hooks for _, h in hosts(model))
    fb.save(model, tmp_path / "a")
    back = store.apply(tiny_llama.fresh(dtype=getattr(torch, dtype)), store.read(tmp_path / "a"))
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(tiny_llama.logits(model), tiny_llama.logits(back))


def test_clipping_makes_every_block_nearer_and_what_was_refined_is_stored(tmp_path: Path) -> None:
    format, told = fb.Int(2, 32, symmetric=False, scale="bf16"), [dict[str, list[float]](), dict[str, list[float]]()]
    refine = (fb.ApiQ(epochs=5, lr=2e-3), fb.ApiQ(epochs=5, lr=2e-3, clip=1.0))
    plain, model = (swept((r,), format, "float32", t.__setitem__, fb.RTN()) for r, t in zip(refine, told, strict=True))
    for name in told[0]:
        assert sum(told[1][name][-4:]) < 0.95 * sum(told[0][name][-4:]), name
    a, b = (m.model.layers[0].mlp.up_proj.weight for m in (plain, model))
    assert not torch.equal(a.parts["codes"], b.parts["codes"]) and a.nbytes == b.nbytes
    fb.save(model, tmp_path / "a")
    back = store.apply(tiny_llama.fresh(), store.read(tmp_path / "a"))
    assert torch.equal(tiny_llama.logits(model), tiny_llama.logits(back))


def test_scales_that_lose_are_put_back() -> None:
    format, told = fb.NF(3, 32, "bf16"), dict[str, list[float]]()
    plain = swept((), format, "float32").state_dict()
    model = swept((fb.ApiQ(epochs=2, scales=30.0),), format, "float32", told.__setitem__).state_dict()
    assert not told["model.layers.0"][4] <= told["model.layers.0"][0]
    assert all(torch.equal(v, plain[k]) for k, v in model.items() if ".0." in k)
    with pytest.raises(ValueError, match="they are learning rates"):
        fb.ApiQ(scales=-1.0)
    with pytest.raises(ValueError, match="not both"):
        fb.ApiQ(scales=1e-3, clip=1e-3)
