"""Laws of an adapter whose weight is one in codes: what is multiplied with is what is served, on every base that it takes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import finebits as fb
from finebits import registry, store
from finebits.adapters.base import Adapter, Base, Over, Params
from finebits.build import Adapted, generator
from finebits.errors import Invalid
from finebits.qtensor import QTensor
from finebits.served import served
from variants import methods

M, N = 12, 70  # blocks end within rows
KINDS = [cls for cls in methods("adapters") if cls().form == "codes"]
RANKED = {"rank": 4}
ADAPTERS: list[Any] = [
    fb.PEQA(16), fb.PEQA("row"), fb.QALoRA(block=16, **RANKED), fb.L4Q(block=16, scale="fp32", **RANKED), fb.L4Q(block="row", bits=3, **RANKED),
    fb.L4Q(block=16, bits=2, symmetric=False, scale="fp16", **RANKED), fb.EfficientDM(**RANKED), fb.EfficientDM(bits=3, scale="fp32", **RANKED),
    fb.LoTA(**RANKED),
]  # fmt: skip
FORMATS = [
    None,
    *(fb.Int(b, 16, s, store) for b in (2, 4) for s in (True, False) for store in ("fp32", "bf16")),
    fb.Int(3, 16, True, variant="full"),
]
FORMATS += [
    fb.Int(3, 16, False, variant="integer"),
    fb.Int(3, "row", False, variant="integer"),
    fb.Int(4, "row"),
    fb.Int(4, "row", False),
    fb.NF(4, 16),
]


def takes(adapter: Any, format: Any) -> bool:
    try:
        adapter.served(format)
    except Invalid:
        return False
    return True


OVER = [(a, f) for a in ADAPTERS for f in FORMATS if takes(a, f)]
every = pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
on_each = pytest.mark.parametrize(("adapter", "format"), OVER, ids=lambda v: str(v).replace("None, ", ""))


def weight(format: Any, seed: int = 0) -> Tensor:
    W = torch.randn(M, N, generator=torch.Generator().manual_seed(seed))
    return W if format is None else fb.quantize(W, format)


def moved(adapter: Any, W: Tensor, seed: int = 0) -> Params:
    gen = torch.Generator().manual_seed(seed)
    return {k: v + 0.1 * torch.randn(v.shape, generator=gen) for k, v in adapter.params(Base(W), gen, {}).items()}


def host(adapter: Any, format: Any, seed: int = 0) -> Adapted:
    linear = nn.Linear(N, M)
    linear.weight = nn.Parameter(weight(format), requires_grad=False)
    over = Adapted.over(linear)
    over.add("default", adapter, generator(seed, "here"), {})
    with torch.no_grad():
        for p in over.p["default"].parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return over


def test_all_are_here_on_a_base_of_each() -> None:
    assert {type(a) for a in ADAPTERS} == set(KINDS) and {a for a, _ in OVER} == set(ADAPTERS)


@on_each
def test_it_says_what_it_is(adapter: Any, format: Any) -> None:
    W = weight(format)
    stored, shapes = adapter.params(Base(W), torch.Generator(), {}), adapter.shapes(M, N)
    assert isinstance(adapter, Adapter) and adapter.own in registry.names("init") and adapter.admits == {"zeros"}
    assert shapes == {k: tuple(v.shape) for k, v in stored.items()} and adapter.kept >= shapes.keys()
    assert adapter.size(M, N) == sum(math.prod(s) for s in shapes.values()) and adapter.stored(M, N) == 0
    assert all(takes(replace(adapter), f) for f in adapter.candidates)


@on_each
def test_forward_is_merged_is_what_is_served(adapter: Any, format: Any) -> None:
    W, b, x = weight(format), torch.randn(M), torch.randn(2, 3, N)
    p = moved(adapter, W)
    q = adapter.coded(p, W)
    assert isinstance(q, QTensor) and q.format == adapter.served(format) and q.shape == W.shape
    assert torch.equal(adapter.merged(p, W), q.dequantize())
    torch.testing.assert_close(adapter.forward(p, x, Base(W, b)), F.linear(x, q.dequantize(), b), rtol=1e-5, atol=1e-5)
    if format is not None:
        assert isinstance(adapter, fb.LoTA) or torch.equal(q.parts["codes"], W.parts["codes"])  # type: ignore[attr-defined]
        assert torch.equal(adapter.coded(adapter.params(Base(W), torch.Generator(), {}), W).dequantize(), W.dequantize())


@on_each
def test_the_codes_are_the_same_whatever_is_computed_in(adapter: Any, format: Any) -> None:
    over = host(adapter, format)
    before = served(over)
    with torch.autocast("cpu", torch.bfloat16):
        y = over(x := torch.randn(5, N))
        assert y.dtype == torch.bfloat16 and torch.equal(served(over).dequantize(), before.dequantize())
    torch.testing.assert_close(y.float(), F.linear(x, before.dequantize(), over.bias), rtol=0.03, atol=0.1)
    low = Base(over.weight, over.bias.bfloat16())
    assert adapter.forward(over.tensors("default", torch.bfloat16), x.bfloat16(), low).dtype == torch.bfloat16


@on_each
def test_gradients_reach_every_tensor_and_add_up(adapter: Any, format: Any) -> None:
    """Over micro-batches, and where the layer is computed again. That of the inputs is that of the weight as it is served."""
    over, x = host(adapter, format).train(), torch.randn(6, 2, N, requires_grad=True)

    def gradients(*steps: Any) -> list[Tensor]:
        over.zero_grad()
        x.grad = None
        for step in steps:
            step().square().sum().backward()
        return [t.grad.clone() for t in (x, *over.p["default"].parameters())]

    whole = gradients(lambda: over(x))
    assert all(g.abs().gt(0).any() for g in whole)
    for other in (gradients(lambda: over(x[:2]), lambda: over(x[2:])), gradients(lambda: checkpoint(over, x, use_reentrant=False))):
        for a, b in zip(other, whole, strict=True):
            assert float((a - b).norm()) <= 1e-5 * float(b.norm())
    y = x.detach().requires_grad_()
    F.linear(y, served(over).dequantize(), over.bias).square().sum().backward()
    torch.testing.assert_close(whole[0], y.grad, rtol=1e-4, atol=1e-4)
    assert {k for k, p in over.named_parameters() if p.requires_grad} == {f"p.default.{k}" for k in adapter.shapes(M, N)}


@on_each
def test_no_tokens_give_no_outputs_and_gradients_of_zeros(adapter: Any, format: Any) -> None:
    over, x = host(adapter, format).train(), torch.zeros(0, N, requires_grad=True)
    over(x).sum().backward()
    assert x.grad is not None and all(p.grad is not None and not p.grad.any() for p in over.p["default"].parameters())


@on_each
def test_a_host_can_be_copied_and_its_state_loaded(adapter: Any, format: Any) -> None:
    one, other, x = host(adapter, format), host(adapter, format, seed=4), torch.randn(3, N)
    twin = copy.deepcopy(one)
    assert torch.equal(twin(x), one(x))
    missing, unexpected = other.load_state_dict(one.state_dict())
    assert not missing and not unexpected and torch.equal(other(x), one(x))
    one.remove("default")
    assert torch.equal(one(x), Base(one.weight, one.bias)(x)) and served(one) is one.weight


@on_each
def test_it_lies_over_a_weight_alone_and_others_over_it(adapter: Any, format: Any) -> None:
    W, x = weight(format), torch.randn(3, N)
    p, lora = moved(adapter, W), fb.LoRA(rank=2)
    over = Over(adapter, p, Base(W))
    q = {k: v + 0.1 for k, v in lora.params(over, torch.Generator(), {}).items()}
    torch.testing.assert_close(Over(lora, q, over)(x), F.linear(x, lora.merged(q, over.weight)), rtol=1e-5, atol=1e-4)
    with pytest.raises(Invalid, match="another adapter lies over this one"):
        adapter.params(Over(lora, q, Base(W)), torch.Generator(), {})


@every
def test_a_base_that_it_does_not_take_is_named(adapter: Any) -> None:
    odd = fb.NF(4) if takes(adapter, None) else None
    with pytest.raises(Invalid, match=f"{type(adapter).__name__} .*this (weight )?is {'NF' if odd else 'dense'}.*: "):
        adapter.params(Base(weight(odd)), torch.Generator(), {})


@every
def test_the_seed_is_all_that_it_is_born_from_and_strange_starts_are_refused(adapter: Any) -> None:
    base = Base(weight(next(f for a, f in OVER if a == adapter)))
    first, again = (adapter.params(base, torch.Generator().manual_seed(0), {}) for _ in range(2))
    assert all(torch.equal(first[k], again[k]) and first[k].dtype == torch.float32 for k in first)
    with pytest.raises(ValueError, match="nonsense"):
        adapter.params(base, torch.Generator(), {"nonsense": torch.zeros(1)})
    k, v = next(iter(first.items()))
    with pytest.raises(ValueError, match="started it as"):
        adapter.params(base, torch.Generator(), {k: torch.zeros(*v.shape, 2)})


@every
def test_dropout_has_no_meaning_for_it(adapter: Any) -> None:
    format = next(f for a, f in OVER if a == adapter)
    with pytest.raises(Invalid, match="dropout of the inputs has no meaning"):
        fb.build(nn.Sequential(nn.Linear(N, M)), fb.Plan({"0": fb.Spec(format, adapter=adapter)}, levers=fb.Levers(dropout=0.1)))


ROUNDED = [a for a in ADAPTERS if takes(a, None)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantizer", [fb.GPTQ(scales="search"), fb.MSE(), fb.RTN()], ids=lambda q: type(q).__name__)
@pytest.mark.parametrize("adapter", ROUNDED, ids=str)
def test_over_a_dense_weight_it_begins_as_what_the_quantizer_made(adapter: Any, quantizer: Any, dtype: str, tmp_path: Path) -> None:
    """In just its codes; a weight that was near its level stays. What rounds to nearest leaves the adapter's own start, and the weight."""
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(M, N, generator=gen).to(getattr(torch, dtype)).float()
    gram = fb.Gram()
    gram.add(torch.randn(200, 8, generator=gen) @ torch.randn(8, N, generator=gen) + 0.1 * torch.randn(200, N, generator=gen))
    stats: Any = {"0": {fb.Gram: gram}}
    plan = fb.Plan({"0": fb.Spec(None, quantizer, adapter)}, levers=fb.Levers(dtype=dtype))
    linear = nn.Linear(N, M)
    linear.weight.data = W.clone()
    model = fb.build(nn.Sequential(linear), plan, stats)
    (over,) = (h for _, h in fb.hosts(model))
    born, p = served(over), over.tensors("default")
    fb.save(model, tmp_path / "x")
    again = store.apply(nn.Sequential(nn.Linear(N, M)), store.read(tmp_path / "x"))
    if quantizer.nearest:
        assert torch.equal(over.weight.float(), W)
        return
    q = fb.quantize(W, adapter.grid, quantizer, stats["0"])
    assert all(torch.equal(born.parts[k], q.parts[k]) for k in q.parts if k != "scale")  # type: ignore[attr-defined]
    torch.testing.assert_close(born.parts["scale"], q.parts["scale"], rtol=1e-6 if adapter.scale == "fp32" else 0, atol=0)  # type: ignore[attr-defined]
    assert torch.equal(served(dict(fb.hosts(again))["0"]).dequantize(), born.dequantize())
    step = adapter.grid.spread(q.parts["scale"].float(), N)
    off = (over.weight.float() - q.dequantize(torch.float32)) / step
    assert float(off.abs().max()) <= 0.3 and float((over.weight.float() == W).float().mean()) > 0.2
    x, g = torch.randn(5, N, generator=gen), torch.randn(5, M, generator=gen)
    found = adapter.gradients(p, x, g, over.weight, born)
    torch.testing.assert_close(found["B"], adapter.s * (g.mT @ x) @ p["A"].mT, rtol=1e-4, atol=1e-4)  # no weight is beyond the levels
