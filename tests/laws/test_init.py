"""Laws of an initialiser."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import finebits as fb
from finebits import registry
from finebits.adapters.base import Base, Params
from finebits.errors import Invalid
from finebits.init.base import check_start
from finebits.plan.base import Plan, Spec
from finebits.qtensor import dense
from finebits.stats.base import Statistic
from finebits.stats.gram import Gram
from finebits.stats.mean_square import MeanSquare
from variants import methods, stats_of, variants

# middle="pinv" is refused over a quantizer, which its own tests say
INITS = [i for cls in methods("init") for i in variants(cls, grid=(5,), middle=("fit", "corner"))]
QUANTIZERS = {
    "identity": lambda V: V,
    "nf2": lambda V: fb.quantize(V, fb.NF(2)),
    "int3": lambda V: fb.quantize(V, fb.Int(3, symmetric=False)),
}
every = pytest.mark.parametrize("init", INITS, ids=str)
# Over the weight itself, and over one of the formats by turns; over the other where `every` test is run.
every_over = pytest.mark.parametrize(
    ("init", "quantizer"),
    [
        pytest.param(init, q, marks=pytest.mark.every if q == ("nf2", "int3")[i % 2] else [])
        for i, init in enumerate(INITS)
        for q in QUANTIZERS
    ],
    ids=str,
)


def adapters(init: Any, rank: int, alpha: float) -> list[Any]:
    """Those that admit it and can have this rank. Where no initialiser starts anything, birth has its laws in test_adapters.py."""
    name, found = type(init).__module__.rpartition(".")[2], []
    for cls in methods("adapters"):
        admits = cls().admits
        if admits is not None and (name not in admits or admits == {"zeros"}):
            continue
        with contextlib.suppress(Invalid):
            found += list(variants(cls, rank=(rank,), basis=(3,), alpha=(alpha,)))
    return found


def some(init: Any, m: int, n: int) -> dict:
    """The statistics that it declares, and no other."""
    return stats_of(torch.randn(64, n) @ torch.randn(n, n), torch.randn(64, m), init.needs)


def complete(adapter: Any, base: Tensor, start: Params) -> Params | None:
    """The adapter's tensors from a start, or None if this adapter has no such parameters, or does not go over such a weight."""
    gen = torch.Generator().manual_seed(0)
    try:
        return adapter.params(Base(base), gen, start) | adapter.buffers(Base(base), gen)
    except ValueError as e:
        assert "no parameter" in str(e) or any(str(length) in str(e) for length in base.shape)
        return None


def test_folder_is_not_empty() -> None:
    assert methods("init")


@given(st.sampled_from(INITS), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.5, 3.0, 64.0]))
def test_exact_means_that_the_start_is_the_weight(init: Any, m: int, n: int, rank: int, alpha: float) -> None:
    W, rank = torch.randn(m, n), min(rank, m, n)
    served = 0
    for adapter in adapters(init, rank, alpha):
        base, start = init(W, adapter, lambda V: V, some(init, m, n))
        p = complete(adapter, base, start)
        if p is not None and init.exact:
            torch.testing.assert_close(adapter.merged(p, base), W, rtol=1e-4, atol=1e-4)
        served += p is not None
    assert served, "no adapter takes what this initialiser starts"


@every
@pytest.mark.parametrize(("quantizer", "alpha"), [("nf2", 2.0), ("int3", 40.0)])
def test_not_worse_than_quantizing_alone(init: Any, quantizer: str, alpha: float) -> None:
    if init.for_training:
        pytest.skip("its start is chosen for training's sake")
    W, stats, quantize = torch.randn(48, 96), some(init, 48, 96), QUANTIZERS[quantizer]
    R = stats[Gram].value() if Gram in init.needs else stats[MeanSquare].value().diag() if MeanSquare in init.needs else torch.eye(96)

    def loss(V: Tensor) -> float:
        return float(((V - W) @ R * (V - W)).sum())

    for adapter in adapters(init, 8, alpha):
        base, start = init(W, adapter, quantize, stats)
        p = complete(adapter, base, start)
        if p is not None:
            assert loss(adapter.merged(p, base)) <= loss(dense(quantize(W))) * (1 + 1e-5)


@every_over
def test_the_start_is_the_same_for_every_alpha(init: Any, quantizer: str) -> None:
    if init.for_training and quantizer != "identity":
        pytest.skip("what it moves may depend on alpha, and so then does what quantizing loses")
    W, stats = torch.randn(24, 70), some(init, 24, 70)
    for one, four in zip(adapters(init, 6, 6.0), adapters(init, 6, 24.0), strict=True):
        starts = []
        for adapter in (one, four):
            base, start = init(W, adapter, QUANTIZERS[quantizer], stats)
            p = complete(adapter, base, start)
            starts.append(None if p is None else adapter.merged(p, base))
        if starts[0] is not None:
            torch.testing.assert_close(starts[0], starts[1], rtol=1e-4, atol=1e-5)


@every_over
def test_the_start_can_be_trained(init: Any, quantizer: str) -> None:
    """After one step every parameter has a gradient: no start is a saddle that training cannot leave."""
    W, x, target = torch.randn(12, 40), torch.randn(30, 40), torch.randn(30, 12)
    for adapter in adapters(init, 4, 8.0):
        base, start = init(W, adapter, QUANTIZERS[quantizer], some(init, 12, 40))
        p = complete(adapter, base, start)
        if p is None:
            continue
        trained = adapter.params(Base(base), torch.Generator().manual_seed(0), start).keys() - getattr(adapter, "frozen", set())
        leaves = {k: v.clone().requires_grad_(k in trained) for k, v in p.items()}
        for _ in range(2):
            for k in trained:
                leaves[k].grad = None
            (adapter.forward(leaves, x, Base(base)) - target).square().mean().backward()
            with torch.no_grad():
                for k in trained:
                    leaves[k] -= 0.1 * leaves[k].grad
        assert all(leaves[k].grad.abs().sum(-1).gt(0).all() for k in trained), f"{type(adapter).__name__} has rows that never move"


@every
def test_declared_needs_are_enough_and_used(init: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    W, adapter = torch.randn(20, 32), fb.LoRA(rank=4, alpha=8.0)
    held = stats_of(torch.randn(64, 32), torch.randn(64, 20), methods("stats"))
    read: set[type[Statistic]] = set()
    for S, s in held.items():
        monkeypatch.setattr(s, "value", lambda S=S, s=s: read.add(S) or S.value(s))
    init(W, adapter, QUANTIZERS["nf2"], held)
    assert read == set(init.needs)
    for missing in init.needs:
        with pytest.raises(ValueError, match=missing.__name__):
            init(W, adapter, QUANTIZERS["nf2"], {S: s for S, s in held.items() if S is not missing})


@every
def test_arguments_are_left_alone_and_low_precision_is_taken(init: Any) -> None:
    W = torch.randn(20, 32, dtype=torch.bfloat16)
    before = W.clone()
    adapter = fb.LoRA(rank=4, alpha=8.0)
    for quantize in QUANTIZERS.values():
        base, start = init(W, adapter, quantize, some(init, 20, 32))
        again, restart = init(W.float(), adapter, quantize, some(init, 20, 32)) if not init.needs else (base, start)
        assert torch.isfinite(dense(base, torch.float32)).all()
        assert all(v.dtype == torch.float32 and torch.isfinite(v).all() for v in start.values())
        assert torch.equal(dense(base, torch.float32), dense(again, torch.float32))
        assert all(torch.equal(start[k], restart[k]) for k in start)
    assert torch.equal(W, before)


def three(seed: int = 3) -> nn.Module:
    gen = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 33), nn.Linear(33, 24))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=gen)
    return model


MATRIX = [n for n in registry.names("adapters") if (a := registry.load("adapters", n)()).over == "matrix" and a.form != "codes"]


def met(init: Any, adapter: str) -> Any:
    """Every initialiser meets LoRA, and every adapter what starts it alone; other pairs where `every` test is run."""
    kind, name = registry.load("adapters", adapter)(), type(init).__module__.rpartition(".")[2]
    known = adapter == "lora" or name in {kind.own} | (kind.admits or set())
    return pytest.param(init, adapter, marks=[] if known else pytest.mark.every)


@pytest.mark.parametrize(("init", "adapter"), [met(init, adapter) for init in INITS for adapter in MATRIX], ids=str)
def test_a_module_does_not_depend_on_its_neighbours(init: Any, adapter: str) -> None:
    kind = registry.load("adapters", adapter)()
    kind = next(variants(type(kind), rank=(4,)))
    try:
        check_start(kind, init)
        for linear in three():
            kind.shapes(*linear.weight.shape)
    except ValueError as e:
        pytest.skip(str(e))
    spec = Spec(format=fb.NF(3), adapter=kind, init=init)
    stats = {name: some(init, *lin.weight.shape) for name, lin in three().named_children()}
    built = []
    for names in (["0", "1", "2"], ["2", "1", "0"], ["1"]):
        torch.manual_seed(len(built))  # the world's randomness is not the module's
        built.append(fb.build(three(), Plan({n: spec for n in names}), stats).get_submodule("1").state_dict())
    for other in built[1:]:
        assert built[0].keys() == other.keys()
        assert all(torch.equal(built[0][k], other[k]) for k in other)


POOR = ("of rank 2", "zero", "of one row", "of one column")


def poor(init: Any, X: Tensor, G: Tensor) -> dict:
    return stats_of(X, G, init.needs)


@every
@pytest.mark.parametrize(
    ("quantizer", "weight"),
    [*(("identity", w) for w in POOR), ("nf2", "of rank 2"), ("nf2", "zero"), ("int3", "of one row"), ("int3", "of one column")],
)
def test_a_poor_weight_is_served_and_can_be_trained(init: Any, quantizer: str, weight: str) -> None:
    """More rank than the weight has: the start is still the weight, finite, and no factor is a row that never moves."""
    m, n = {"of one row": (1, 40), "of one column": (12, 1)}.get(weight, (12, 40))
    W = {"of rank 2": torch.randn(12, 2) @ torch.randn(2, 40), "zero": torch.zeros(12, 40)}.get(weight, torch.randn(m, n))
    rank = min(5, m, n)
    for adapter in adapters(init, rank, 3.0):
        base, start = init(W, adapter, QUANTIZERS[quantizer], some(init, m, n))
        p = complete(adapter, base, start)
        if p is None:
            continue
        merged = adapter.merged(p, dense(base, torch.float32))
        assert torch.isfinite(merged).all() and all(torch.isfinite(v).all() for v in p.values())
        if init.exact and quantizer == "identity":
            torch.testing.assert_close(merged, W, rtol=1e-4, atol=1e-4)
        if set(start) >= {"A", "B"}:
            assert (p["A"].norm(dim=1) + p["B"].norm(dim=0) > 0).all(), "A and B are zero together: no gradient leaves this point"


@every
def test_more_rank_than_the_matrix_has_is_refused_or_served(init: Any) -> None:
    W = torch.randn(4, 30)
    for adapter in adapters(init, 5, 10.0):
        try:
            base, start = init(W, adapter, QUANTIZERS["identity"], some(init, 4, 30))
        except ValueError as e:
            assert "rank" in str(e) and "4x30" in str(e)
            continue
        p = complete(adapter, base, start)
        if p is not None and init.exact:
            torch.testing.assert_close(adapter.merged(p, base), W, rtol=1e-4, atol=1e-4)


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_with_nan_or_inf_is_refused(init: Any, bad: float) -> None:
    W = torch.randn(12, 40)
    W[3, 7] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        init(W, fb.LoRA(rank=4), QUANTIZERS["nf2"], some(init, 12, 40))


@every
def test_statistics_with_nan_and_those_of_another_module_are_refused(init: Any) -> None:
    W, X, G = torch.randn(12, 40), torch.randn(50, 40), torch.randn(50, 12)
    for S in init.needs:
        stats = poor(init, X, G)
        assert stats[S].total is not None
        stats[S].total[(0,) * stats[S].total.ndim] = torch.nan
        with pytest.raises(ValueError, match="NaN or Inf"):
            init(W, fb.LoRA(rank=4), QUANTIZERS["nf2"], stats)
        with pytest.raises(ValueError, match="another module's"):
            init(W, fb.LoRA(rank=4), QUANTIZERS["nf2"], poor(init, X, G) | {S: poor(init, torch.randn(50, 41), G)[S]})


@every
@pytest.mark.parametrize("tokens", [1, 3])
def test_statistics_of_few_tokens_and_of_inputs_that_are_nothing(init: Any, tokens: int) -> None:
    W = torch.randn(12, 40)
    few = poor(init, torch.randn(tokens, 40), torch.randn(tokens, 12))
    nothing = poor(init, torch.zeros(tokens, 40), torch.zeros(tokens, 12))
    for stats in (few, nothing) if init.needs else (few,):
        for adapter in adapters(init, 4, 3.0):
            try:
                base, start = init(W, adapter, QUANTIZERS["nf2"], stats)
            except ValueError as e:
                assert stats is nothing and "zero" in str(e)
                continue
            p = complete(adapter, base, start)
            if p is not None:
                assert torch.isfinite(adapter.merged(p, dense(base, torch.float32))).all()


@every
def test_moving_the_base_is_said(init: Any) -> None:
    """Where nothing is quantized the base is W, unless it `moves`; and what is not `exact` really is not."""
    W, stats, moved, served = torch.randn(12, 40), some(init, 12, 40), False, False
    for adapter in adapters(init, 4, 3.0):
        base, start = init(W, adapter, QUANTIZERS["identity"], stats)
        p = complete(adapter, base, start)
        if p is None:
            continue
        far = float((adapter.merged(p, base) - W).norm() / W.norm())
        assert far < 1e-4 if init.exact else far > 1e-6
        served = True
        moved |= not torch.equal(base, W)
    assert served and moved == init.moves
