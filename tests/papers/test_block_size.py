"""Block-size tuning: the acceptance properties of its specification, rule by rule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import finebits as fb
from finebits.formats._stores import Clustered, Double
from finebits.interop.selecting import head_units
from finebits.plan import cost
from finebits.plan.base import Infeasible
from finebits.plan.knapsack import total
from finebits.planners.block_size import BlockSize, TooMuchOverhead
from finebits.planners.uniform import Uniform

SHARES = (0.01, 0.02, 0.05, 0.1, 0.25)
PLENTY = 10**12
BLOCKS = (32, 64, 128, 256, 512, 1024)


def menu(
    weights: dict[str, torch.Tensor],
    format: Any,
    sizes: Sequence[int] = BLOCKS,
    stores: Sequence[Any] = (),
    sensitivity: dict[str, float] | None = None,
    units: dict[str, int | None] | None = None,
) -> dict[str, list[fb.Option]]:
    """Every block size (and scale store) for every layer, with ω times the relative error."""
    found = {}
    for name, W in weights.items():
        unit = (units or {}).get(name)
        width = min(W.shape[1], unit or W.shape[1])
        kept = [b for i, b in enumerate(sizes) if i == 0 or sizes[i - 1] < width]  # larger ones repeat the last
        specs = [fb.Spec(replace(format, block=b, unit=unit, scale=s)) for b in kept for s in (stores or (format.scale,))]
        cells = cost.row(W, specs, {}, cost.error("weight", W.float(), {}), 4)
        more = {"kurtosis": cost.kurtosis(W)}
        omega = (sensitivity or {}).get(name, 1.0)
        found[name] = [replace(o, loss=omega * o.loss, more={**o.more, **more}) for o in cost.options(cells, specs)]
    return found


def toy(layers: int = 12, rows: int = 8, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Layers of mixed sizes, tails (normal to Student's t of 2.5 degrees) and sensitivities."""
    gen = torch.Generator().manual_seed(seed)
    weights, omega = {}, {}
    for i in range(layers):
        n = (1024, 2048, 4096)[i % 3]
        W = torch.randn(rows, n, generator=gen)
        if i % 2:
            chi = torch.randn(3 + i % 3, rows, n, generator=gen).square().mean(0)
            W = W / chi.sqrt()
        weights[f"layers.{i}.proj"] = W
        omega[f"layers.{i}.proj"] = float(torch.exp(1.5 * torch.randn((), generator=gen)))
    return weights, omega


@pytest.fixture(scope="module")
def made() -> dict[str, list[fb.Option]]:
    weights, omega = toy()
    return menu(weights, fb.NF(4), sensitivity=omega)


def overhead(choice: dict[str, fb.Option]) -> float:
    scales = sum(o.more["overhead"] for o in choice.values())
    return scales / (sum(o.more["weight"] for o in choice.values()) - scales)


def best_uniform(made: dict[str, list[fb.Option]], planner: BlockSize) -> float:
    return total(Uniform()(made, planner.allowed(made)))[1]


@pytest.mark.parametrize("by", ["hull", "exact"])
def test_the_overhead_stays_within_every_budget_and_more_never_costs(made: dict, by: Any) -> None:
    losses = []
    for share in SHARES:
        choice = BlockSize(overhead=share, by=by)(made, PLENTY)
        assert overhead(choice) <= share
        losses.append(total(choice)[1])
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_an_impossible_share_names_the_least_that_is_possible(made: dict) -> None:
    with pytest.raises(TooMuchOverhead, match="scales take at least 0.7812 % of the codes' bytes, and overhead=0.005 came") as caught:
        BlockSize(overhead=0.005)(made, PLENTY)
    assert isinstance(caught.value, Infeasible) and caught.value.overhead == pytest.approx(32 / 4096)
    least = BlockSize(overhead=caught.value.overhead)(made, PLENTY)
    assert {o.spec.format.block for o in least.values()} == {1024} and total(least)[0] == caught.value.smallest


def test_it_beats_every_uniform_block_by_a_quarter(made: dict) -> None:
    planner = BlockSize(overhead=0.05, by="exact")
    choice = planner(made, PLENTY)
    assert total(choice)[1] <= 0.75 * best_uniform(made, planner)
    assert total(BlockSize(overhead=0.05)(made, PLENTY))[1] <= 1.02 * total(choice)[1]
    assert len({o.spec.format.block for o in choice.values()}) > 2  # R5: mixed sizes
    assert total(choice)[1] == pytest.approx(total(fb.MILP(overhead=0.05)(made, PLENTY))[1], rel=1e-9)


def test_it_equals_brute_force_on_four_layers() -> None:
    weights, omega = toy(4, rows=2)
    made = menu(weights, fb.NF(4, scale="fp16"), sensitivity=omega)
    for share in (0.02, 0.05, 0.1):
        every = (dict(zip(made, picked, strict=True)) for picked in itertools.product(*made.values()))
        wanted = min(total(c)[1] for c in every if overhead(c) <= share)
        assert total(BlockSize(overhead=share, by="exact")(made, PLENTY))[1] == pytest.approx(wanted)


def test_a_more_sensitive_layer_gets_no_larger_block() -> None:
    weights, omega = toy()
    name = "layers.4.proj"
    block = lambda w: BlockSize(overhead=0.05, by="exact")(menu(weights, fb.NF(4), sensitivity=w), PLENTY)[name].spec.format.block  # noqa: E731
    assert block(omega | {name: 100 * omega[name]}) <= block(omega) and block(omega | {name: 1e6}) == 32


def test_of_two_layers_of_equal_values_the_larger_gets_the_larger_block() -> None:
    tile = torch.randn(16, 1024)
    weights = {"small": tile.repeat(4, 1), "large": tile.repeat(64, 1), "other": torch.randn(256, 1024)}
    made = menu(weights, fb.NF(4))
    for share in (0.02, 0.03, 0.05, 0.08):
        choice = BlockSize(overhead=share, by="exact")(made, PLENTY)
        assert choice["large"].spec.format.block >= choice["small"].spec.format.block
    assert choice["small"].spec.format.block < BlockSize(overhead=0.02, by="exact")(made, PLENTY)["large"].spec.format.block


def test_blocks_do_not_cross_heads() -> None:
    names = ["model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_proj"]
    config = SimpleNamespace(num_attention_heads=4, hidden_size=4 * 48)
    units = head_units(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config)), names)
    assert units == {names[0]: 48, names[1]: None}
    W = torch.randn(8, 4 * 48)
    made = menu({names[0]: W}, fb.NF(4), sizes=(16, 32, 64, 128), units=units)
    assert [o.spec.format.block for o in made[names[0]]] == [16, 32, 64]  # 128 would be 64 again: a head ends before
    loud = W.clone()
    loud[:, 48:96] *= 1000
    for o in made[names[0]]:
        a, b = (fb.quantize(x, o.spec.format).dequantize() for x in (W, loud))
        assert torch.equal(a[:, :48], b[:, :48]) and torch.equal(a[:, 96:], b[:, 96:])
        assert o.bytes == fb.quantize(W, o.spec.format).nbytes


def test_scale_stores_widen_what_a_share_can_buy() -> None:
    """R10 and R11: shared scales and double quantization under 1 % of overhead."""
    weights, omega = toy(6)
    plain = menu(weights, fb.NF(4), sensitivity=omega)
    rich = menu(weights, fb.NF(4), sensitivity=omega, stores=("fp32", "fp16", Double(8, 64), Double(4, 16, "zero", "fp16"), Clustered(16)))
    planner = BlockSize(overhead=0.02, by="exact")
    assert total(planner(rich, PLENTY))[1] < 0.98 * total(planner(plain, PLENTY))[1]
    assert {type(o.spec.format.scale) for o in planner(rich, PLENTY).values()} != {str}
    table = {(b, s): 100 * fb.NF(4, b, s).scale_bits(1 << 16) / (4 << 16) for b in BLOCKS for s in ("fp32", "fp16", Double(8, 256))}
    assert table[64, "fp32"] == 12.5 and table[1024, "fp32"] == pytest.approx(0.781, abs=1e-3) and table[128, "fp16"] == 3.125
    assert table[64, Double(8, 256)] == pytest.approx(3.174, abs=1e-3) and table[32, Double(8, 256)] == pytest.approx(6.348, abs=1e-3)


def test_memory_binds_as_well(made: dict) -> None:
    free = total(BlockSize(overhead=0.25)(made, PLENTY))[0]
    choice = BlockSize(overhead=0.25)(made, free - 2000)
    assert total(choice)[0] <= free - 2000
    largest = max(o.bytes for options in made.values() for o in options)
    tight = BlockSize(layer=largest - 1)(made, PLENTY)
    assert max(o.bytes for o in tight.values()) < largest
    with pytest.raises(ValueError, match="takes at least .* bytes and layer=100"):
        BlockSize(layer=100)(made, PLENTY)
    mixed = {"a": made["layers.0.proj"] + menu({"a": toy(1)[0]["layers.0.proj"]}, fb.NF(3))["a"]}
    with pytest.raises(ValueError, match="one code width, and a has several"):
        BlockSize(overhead=0.05)(mixed, PLENTY)


def test_the_heuristic_follows_size_tails_and_sensitivity() -> None:
    weights = {"big": torch.randn(1024, 1024), "small": torch.randn(16, 1024), "tailed": torch.randn(1024, 1024).pow(3)}
    blocks = lambda choice: {n: o.spec.format.block for n, o in choice.items()}  # noqa: E731
    thumb, made = BlockSize(by="heuristic"), menu(weights, fb.NF(4))
    assert blocks(thumb(made, PLENTY)) == {"big": 1024, "small": 64, "tailed": 256}
    assert abs(cost.kurtosis(weights["big"])) < 0.1 and cost.kurtosis(weights["tailed"]) > 5
    four = menu(weights | {"other": weights["small"]}, fb.NF(4), sensitivity={"big": 99.0})
    assert blocks(thumb(four, PLENTY)) == {"big": 512, "small": 64, "tailed": 256, "other": 64}
    budget = BlockSize(overhead=0.015).allowed(made)
    repaired = BlockSize(overhead=0.015, by="heuristic")(made, PLENTY)
    assert total(repaired)[0] <= budget and overhead(repaired) <= 0.015
    assert total(repaired)[1] >= total(BlockSize(overhead=0.015, by="exact")(made, PLENTY))[1]
    with pytest.raises(Infeasible):
        thumb(made, 1000)
    with pytest.raises(ValueError, match="needs options that say their kurtosis"):
        thumb({n: [replace(o, more={}) for o in v] for n, v in made.items()}, PLENTY)


def test_what_is_tried_lies_around_the_optimum_and_within_the_limits(made: dict) -> None:
    planner = BlockSize(overhead=0.05, trials=2)
    optimum = planner(made, PLENTY)
    tried = dict(planner.neighbours(made, PLENTY, optimum))
    assert tried["optimum"] == optimum and all(overhead(c) <= 0.05 for c in tried.values())
    assert any(n.startswith("uniform") for n in tried) and sum(" at " in n for n in tried) in (1, 2, 3, 4)
    worst = sorted(optimum, key=lambda n: -optimum[n].loss)[:2]
    assert {n.partition(" at ")[0] for n in tried if " at " in n} <= set(worst)
    assert all(sum(c[n] != optimum[n] for n in made) == 1 for said, c in tried.items() if " at " in said)


def test_the_report_says_why(made: dict) -> None:
    planner = BlockSize(overhead=0.05)
    choice = planner(made, PLENTY)
    said = planner.explained(made, choice, PLENTY)
    assert said["active"] == "overhead" and said["overhead"] == pytest.approx(overhead(choice)) and said["bytes"] == total(choice)[0]
    assert len(said["rows"]) == 12 and all(r["reason"] for r in said["rows"])
    assert BlockSize().explained(made, BlockSize()(made, PLENTY), PLENTY)["active"] is None
