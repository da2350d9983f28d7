"""Laws of an adapter."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import finebits as fb
from finebits import registry
from finebits.adapters.base import Adapter, Base, Over, Params
from finebits.build import Adapted, generator
from finebits.errors import Invalid
from finebits.qtensor import QTensor
from variants import methods, variants

BOTTLENECK = {"activation": ("gelu",), "position": ("serial", "parallel"), "start": ("truncated", "zero_up")}
SMALL: dict[str, tuple[Any, ...]] = {"block": (4,), "basis": (4,), "reduction": (2,)}
RANK = 4
MATRIX = [
    cls for cls in methods("adapters") if cls().over == "matrix" and not cls().itself and cls().form != "codes"
]  # of the others: test_module_adapters.py, test_full.py, test_coded_adapters.py


def small(cls: type, rank: int, alpha: float) -> list[Any]:
    """Every variant; of a method with many settings that do not depend on each other, a few."""
    return list(variants(cls, rank=(rank,), alpha=(alpha,), **SMALL, **(BOTTLENECK if cls is fb.Bottleneck else {})))


ADAPTERS = [a for cls in MATRIX for a in small(cls, RANK, 3.0)]
every = pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
M, N = 12, 20
BASES = {
    "dense": lambda W: W,
    "nf4": lambda W: fb.quantize(W, fb.NF(4, block=16)),
    "int3": lambda W: fb.quantize(W, fb.Int(3, block=16, symmetric=False)),
    "nf2": lambda W: fb.quantize(W, fb.NF(2, block=16)),
}


# Over a dense weight, and over one of the formats by turns; over the others where `every` test is run.
every_over = pytest.mark.parametrize(
    ("adapter", "kind"),
    [
        pytest.param(adapter, kind, marks=[] if k in (0, 1 + i % (len(BASES) - 1)) else pytest.mark.every)
        for i, adapter in enumerate(ADAPTERS)
        for k, kind in enumerate(BASES)
    ],
    ids=str,
)


def born(adapter: Any, base: Base, seed: int = 0) -> Params:
    gen = torch.Generator().manual_seed(seed)
    return adapter.params(base, gen, {}) | adapter.buffers(base, gen)


def moved(adapter: Any, base: Base, seed: int = 0) -> Params:
    """Tensors somewhere on the way: nothing is at its birth value."""
    gen = torch.Generator().manual_seed(seed + 1)
    stored, names = adapter.params(base, gen, {}), trained(adapter, base)
    return born(adapter, base, seed) | {k: v + 0.3 * torch.randn(v.shape, generator=gen) for k, v in stored.items() if k in names}


def trained(adapter: Any, base: Base) -> set[str]:
    return set(adapter.params(base, torch.Generator().manual_seed(0), {})) - adapter.frozen


def host(adapter: Any, kind: str = "int3", seed: int = 0) -> Adapted:
    linear = nn.Linear(N, M)
    gen = torch.Generator().manual_seed(7)
    linear.weight.data, linear.bias.data = torch.randn(M, N, generator=gen), torch.randn(M, generator=gen)
    linear.weight = nn.Parameter(BASES[kind](linear.weight.data), requires_grad=False)
    over = Adapted.over(linear)
    over.add("default", adapter, generator(seed, "here"), {})
    with torch.no_grad():
        for p in (p for p in over.p["default"].parameters() if p.is_floating_point()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return over


@every
def test_it_says_what_it_is(adapter: Any) -> None:
    """What a planner, a start and an exporter ask of an adapter."""
    assert isinstance(adapter, Adapter) and adapter.rank == (RANK if "rank" in vars(adapter) else 0)
    assert adapter.own in registry.names("init") and (adapter.admits is None or adapter.own in adapter.admits)
    for m, n in ((M, N), (64, 8), (8, 64), (33, 33)):
        base, gen = Base(torch.randn(m, n)), torch.Generator().manual_seed(0)
        try:
            shapes = adapter.shapes(m, n)
        except Invalid as e:
            assert (m, n) != (M, N) and (str(m) in str(e) or str(n) in str(e))
            continue
        stored, buffers = adapter.params(base, gen, {}), adapter.buffers(base, gen)
        assert shapes == {k: tuple(v.shape) for k, v in (stored | buffers).items()}
        assert buffers.keys() <= adapter.frozen < shapes.keys() and adapter.shared <= shapes.keys()
        assert adapter.size(m, n) + adapter.stored(m, n) == sum(math.prod(s) for s in shapes.values())
        assert adapter.stored(m, n) == sum(math.prod(shapes[k]) for k in adapter.frozen)
    wanted = {"product": "lowrank", "scaled": "scaled", "weight": "merged", "beside": "forward"}
    assert hasattr(adapter, wanted[adapter.form]) and hasattr(adapter, "merged") == (adapter.form != "beside")


@every
def test_what_is_shared_comes_of_the_seed_and_the_shape(adapter: Any) -> None:
    one, other = (born(adapter, Base(W, torch.randn(M))) for W in (torch.zeros(M, N), torch.randn(M, N)))
    assert all(torch.equal(one[k], other[k]) for k in adapter.shared)


def test_folder_is_not_empty() -> None:
    assert methods("adapters")


@every_over
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_merged(adapter: Any, kind: str, bias: bool) -> None:
    W, b, x = BASES[kind](torch.randn(M, N)), torch.randn(M) if bias else None, torch.randn(2, 3, N)
    p = moved(adapter, Base(W, b))
    y = adapter.forward(p, x, Base(W, b))
    if adapter.form != "beside":
        torch.testing.assert_close(y, F.linear(x, adapter.merged(p, W), adapter.bias(p, b)), rtol=1e-5, atol=1e-5)


@given(st.sampled_from(MATRIX), st.integers(1, 17), st.integers(1, 70), st.integers(1, 20), st.integers(0, 3))
def test_forward_is_merged_at_any_shape(cls: type, m: int, n: int, rank: int, batch: int) -> None:
    try:
        adapters = small(cls, rank, 2.0)
    except Invalid as e:
        assert str(rank) in str(e)
        return
    for adapter in adapters:
        base = Base(torch.randn(m, n))
        try:
            p, x = moved(adapter, base), torch.randn(batch, n)
        except Invalid as e:  # a shape that the paper does not cover is refused with it
            assert str(m) in str(e) or str(n) in str(e)
            continue
        got = adapter.forward(p, x, base)
        assert got.shape == (batch, m)
        if adapter.form != "beside":
            wanted = F.linear(x, adapter.merged(p, base.weight), adapter.bias(p, None))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


INNER = [  # of every form, and what moves the bias, the rows and the columns of what lies over it
    fb.LoRA(rank=RANK), fb.Gated(rank=RANK), fb.DoRA(rank=RANK), fb.IA3(), fb.IA3("input"), fb.BitFit(), fb.HiRA(rank=RANK),
    fb.Bottleneck(reduction=2), fb.Smoothed(rank=RANK),
]  # fmt: skip


@every
def test_adapters_nest(adapter: Any) -> None:
    W, b, x = BASES["nf4"](torch.randn(M, N)), torch.randn(M), torch.randn(4, N)
    for inner in INNER:
        below = Over(inner, moved(inner, Base(W, b)), Base(W, b))
        if inner.form == "beside":
            with pytest.raises(Invalid, match="depends on its input"):
                _ = below.weight
            continue
        p = moved(adapter, below, seed=5)
        both, flat = Over(adapter, p, below), Base(below.weight, below.bias)
        torch.testing.assert_close(both(x), adapter.forward(p, x, flat), rtol=1e-5, atol=2e-5)
        if adapter.form != "beside":
            torch.testing.assert_close(both(x), F.linear(x, both.weight, both.bias), rtol=1e-5, atol=2e-5)


@every_over
def test_at_birth_it_changes_nothing_unless_it_says_so(adapter: Any, kind: str) -> None:
    base = Base(BASES[kind](torch.randn(M, N)), torch.randn(M))
    x = torch.randn(4, N)
    if getattr(adapter, "identity_at_birth", True):
        assert torch.equal(adapter.forward(born(adapter, base), x, base), base(x))


@every_over
def test_gradients_reach_every_parameter_and_nothing_else(adapter: Any, kind: str) -> None:
    base = Base(BASES[kind](torch.randn(M, N)), torch.randn(M))
    x = torch.randn(6, N, requires_grad=True)
    p = {k: v.requires_grad_(k in trained(adapter, base)) for k, v in moved(adapter, base).items()}
    adapter.forward(p, x, base).square().sum().backward()
    assert all((v.grad is not None and v.grad.abs().gt(0).any()) == (k in trained(adapter, base)) for k, v in p.items())
    if adapter.form == "beside" or getattr(adapter, "holds", ""):  # what counts as a constant in its paper has another gradient
        return
    dense = base.weight.dequantize() if isinstance(base.weight, QTensor) else base.weight
    y, q = x.detach().requires_grad_(), {k: v.detach().requires_grad_(v.requires_grad) for k, v in p.items()}
    F.linear(y, adapter.merged(q, dense), adapter.bias(q, base.bias)).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    for k in trained(adapter, base):
        torch.testing.assert_close(p[k].grad, q[k].grad, rtol=1e-4, atol=1e-4)


@every
def test_no_tokens_give_no_outputs_and_gradients_of_zeros(adapter: Any) -> None:
    """What an expert is given that no token was sent to."""
    over, x = host(adapter).train(), torch.zeros(0, N, requires_grad=True)
    y = over(x)
    y.sum().backward()
    assert y.shape == (0, M) and x.grad is not None
    assert all(p.grad is not None and not p.grad.any() for p in over.parameters() if p.requires_grad)


@every_over
def test_low_precision_stays_low_and_near(adapter: Any, kind: str) -> None:
    base = Base(BASES[kind](torch.randn(M, N)), torch.randn(M))
    p, x = moved(adapter, base), torch.randn(5, N)
    low = Base(base.weight if kind != "dense" else base.weight.bfloat16(), base.bias.bfloat16())
    y = adapter.forward({k: v.bfloat16() if v.is_floating_point() else v for k, v in p.items()}, x.bfloat16(), low)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), adapter.forward(p, x, base), rtol=0.05, atol=0.3)


@every
def test_the_seed_is_all_that_it_is_born_from(adapter: Any) -> None:
    base = Base(torch.randn(M, N))
    first, again, other = born(adapter, base), born(adapter, base), born(adapter, base, seed=1)
    elsewhere = born(adapter, Base(torch.randn(M, N)))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(v.dtype == (torch.float32 if v.is_floating_point() else torch.int32) for v in first.values())
    random = [k for k in trained(adapter, base) if first[k].unique().numel() > 2 and torch.equal(first[k], elsewhere[k])]
    assert all(not torch.equal(first[k], other[k]) for k in random)


@every
def test_an_unknown_or_misshapen_start_is_refused(adapter: Any) -> None:
    base, gen = Base(torch.randn(M, N)), torch.Generator()
    with pytest.raises(ValueError, match="nonsense"):
        adapter.params(base, gen, {"nonsense": torch.zeros(1)})
    k, v = next(iter(adapter.params(base, gen, {}).items()))
    with pytest.raises(ValueError, match="started it as"):
        adapter.params(base, gen, {k: torch.zeros(*v.shape, 2)})


@every
def test_what_is_exported_as_low_rank_is_what_it_does(adapter: Any) -> None:
    base = Base(torch.randn(M, N))
    p = moved(adapter, base)
    if adapter.form == "product":
        L, R = adapter.lowrank(p)
        torch.testing.assert_close(L @ R, adapter.merged(p, base.weight) - base.weight, rtol=1e-4, atol=1e-5)
    elif adapter.form == "scaled":
        torch.testing.assert_close(adapter.scaled(p, base.weight).of(base.weight), adapter.merged(p, base.weight), rtol=1e-4, atol=1e-5)


@every_over
def test_a_host_can_be_copied_and_its_state_loaded(adapter: Any, kind: str) -> None:
    one, x = host(adapter, kind), torch.randn(3, N)
    twin = copy.deepcopy(one)
    assert torch.equal(twin(x), one(x)) and twin.kinds == one.kinds
    with torch.no_grad():
        next(iter(twin.p["default"].values())).add_(1.0)
    assert not torch.equal(twin(x), one(x)), "the copy shares storage with the original"
    other = host(adapter, kind, seed=4)
    state = {k: v.clone() for k, v in one.state_dict().items()}
    assert all(type(v) in (Tensor, nn.Parameter) for v in one.state_dict().values())
    missing, unexpected = other.load_state_dict(state)
    assert not missing and not unexpected
    assert torch.equal(other(x), one(x))


@every_over
def test_two_micro_batches_are_one_and_recomputing_changes_nothing(adapter: Any, kind: str) -> None:
    """Gradients of all trained tensors, and of the inputs."""
    over, x = host(adapter, kind).train(), torch.randn(6, 2, N, requires_grad=True)

    def gradients(*steps: Callable[[], Tensor]) -> list[Tensor]:
        over.zero_grad()
        x.grad = None
        for step in steps:
            step().square().sum().backward()
        return [t.grad.clone() for t in (x, *over.parameters()) if t.grad is not None]

    whole = gradients(lambda: over(x))
    for other in (gradients(lambda: over(x[:2]), lambda: over(x[2:])), gradients(lambda: recomputed(over, x))):
        assert len(other) == len(whole)
        for a, b in zip(other, whole, strict=True):
            assert float((a - b).norm()) <= 1e-6 * float(b.norm())


def recomputed(over: Adapted, x: Tensor) -> Any:
    return checkpoint(over, x, use_reentrant=False)


@every
def test_only_parameters_of_the_adapter_are_trained(adapter: Any) -> None:
    over = host(adapter)
    names = {k for k, p in over.named_parameters() if p.requires_grad}
    assert names == {f"p.default.{k}" for k in trained(adapter, Base(over.weight))}


@every
def test_dropout_reaches_the_update_alone(adapter: Any) -> None:
    """With everything dropped an additive update is gone and the base is whole; in evaluation nothing is dropped."""
    if not adapter.drops:
        spec = fb.Spec(adapter=adapter, init=registry.load("init", adapter.own)())
        with pytest.raises(Invalid, match="dropout of the inputs has no meaning"):
            fb.build(nn.Sequential(nn.Linear(N, M)), fb.Plan({"0": spec}, levers=fb.Levers(dropout=0.1)))
        return
    over, x = host(adapter), torch.randn(50, N)
    calm = over.eval()(x)
    over.dropout = 0.5
    assert torch.equal(over(x), calm)
    assert not torch.equal(over.train()(x), calm)
    if adapter.form == "product":
        over.dropout = 1.0
        torch.testing.assert_close(over(x), Base(over.weight, over.bias)(x))


@every
def test_removing_leaves_the_base(adapter: Any) -> None:
    over, x = host(adapter), torch.randn(3, N)
    with pytest.raises(ValueError, match="already"):
        over.add("default", adapter, generator(0, "x"), {})
    over.remove("default")
    assert torch.equal(over(x), Base(over.weight, over.bias)(x))
    assert not [p for p in over.parameters() if p.requires_grad]


@pytest.mark.parametrize("cls", methods("adapters"))
def test_a_setting_without_meaning_is_refused(cls: type) -> None:
    known = {f.name for f in dataclasses.fields(cls)}
    if "rank" in known:
        with pytest.raises(ValueError, match="rank"):
            cls(rank=0)
    for alpha in (0.0, -1.0, math.nan) if "alpha" in known else ():
        with pytest.raises(ValueError, match="alpha"):
            cls(alpha=alpha)
