"""What is chosen together: ranks, starts, bits, levers, a second budget, by any planner; solved again as it was; or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import finebits as fb
from finebits import registry
from finebits.interop.planning import Settings, compare, plan_model
from finebits.interop.selecting import Mistake
from finebits.plan.base import Infeasible, Plan
from finebits.plan.footprint import Footprint
from finebits.plan.levers import PULLS
from finebits.plan.memory import Trained
from finebits.plan.problem import menu_of
from finebits.plan.solve import again
from tiny_llama import names

FORMATS = tuple(fb.NF(bits, block=32, scale="bf16") for bits in (2, 3, 4, 8))
ROWS = [{"text": " ".join(f"w{(i * j * j) % 120 + 1}" for j in range(14))} for i in range(1, 9)]
JOINT: dict[str, Any] = dict(ranks=(2, 4, 16), inits=(fb.Zeros(), fb.LoftQ(steps=1)))
TIES = (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"))


def settings(**more: Any) -> Settings:
    given: dict[str, Any] = dict(formats=FORMATS, adapter=fb.LoRA(rank=4, alpha=4), init=fb.Zeros(), max_length=64, calibration_rows=4)
    beside: dict[str, Any] = dict(
        reserve=0.0, left_out=("full", "samples", "export", "verify")
    )  # on so small a model code of the math library is most of these phases
    return Settings(**given | dict(per_device_train_batch_size=4, loss_chunk=64, dtype="float32", runtime=0) | beside | more)


def same(a: Plan, b: Plan) -> bool:
    return a.to_json() == b.to_json()


@pytest.mark.parametrize("adapter", [fb.LoRA(rank=4, alpha=4), fb.LoRAXS(rank=4)], ids=["lora", "frozen factors"])
def test_ranks_bits_and_levers(small: Path, adapter: Any) -> None:
    given = settings(adapter=adapter, levers=PULLS, **JOINT | ({} if isinstance(adapter, fb.LoRA) else {"inits": ()}))
    free = plan_model(small, None, None, given)
    budget = free.peak - 500_000
    made = plan_model(small, budget, None, given)
    assert made.peak <= budget and made.levers.per_device_train_batch_size < 4
    counts = [(s.adapter, *made.costs[n]["shape"]) for n, s in made.modules.items()]
    trained = sum(a.size(m, n) for a, m, n in counts)
    assert made.memory["adapters"] == 4 * trained and made.memory["optimizer"] == 8 * trained  # once, and exactly
    assert made.memory["frozen factors"] == (0 if isinstance(adapter, fb.LoRA) else 4 * sum(a.rank * (m + n) for a, m, n in counts))
    assert made.memory["linear weights"] == sum(c["bytes"] for c in made.costs.values())
    (row,) = [r for r in made.solver["alternatives"] if r["chosen"]]
    assert row["peak"] == made.peak and row["loss"] == made.solver["loss"]
    assert same(again(Plan.from_json(made.to_json())), made)


@pytest.mark.parametrize("levers", [{}, {"gradient_checkpointing": False}, {"gradient_accumulation_steps": 2}], ids=str)
def test_what_a_planner_adds_up_never_lies_below_the_peak(small: Path, levers: dict[str, Any]) -> None:
    plan = plan_model(small, None, None, settings(ranks=(2, 4, 16), **levers))
    footprint, menu = Footprint.of(plan), menu_of(plan)
    rates, rest = footprint.rates(menu, plan.levers)
    held = footprint.costed(menu, rates)
    for pick in (min, max):
        at = {name: pick(range(len(v)), key=lambda i, v=v: v[i].bytes + v[i].more["trained"]) for name, v in menu.items()}
        exact = footprint.peak({name: menu[name][i] for name, i in at.items()}, plan.levers)
        added = sum(held[name][i].bytes for name, i in at.items()) + rest
        wide = footprint.rest(plan.levers, Trained(0, 0, 16)) - footprint.rest(plan.levers, Trained(0, 0, 2))  # the widest rank is assumed
        assert exact <= added <= exact + wide + 100


def test_side_constraints_hold_with_levers_and_afterwards(small: Path) -> None:
    given = settings(planner=fb.MILP(ties=TIES), levers=PULLS)
    free = plan_model(small, None, None, given)
    made = plan_model(small, free.peak - 500_000, None, given, pareto=4)
    for plan in (made, again(made, budget=made.budget - 10_000, pareto=3), again(Plan.from_json(made.to_json()), pareto=4)):  # type: ignore[operator]
        assert plan.peak <= plan.budget and plan.solver["name"] == "milp"  # type: ignore[operator]
        for i in (0, 1):
            for group in TIES:
                assert len({s.format for n, s in plan.modules.items() if f".{i}." in n and n.rpartition(".")[2] in group}) == 1
    assert same(again(Plan.from_json(made.to_json()), pareto=4), made)
    few = settings(planner=fb.MILP(formats=1), levers=("micro_batch",))
    least = plan_model(small, None, None, few)
    with pytest.raises(Infeasible, match="the budget is 100 KiB") as caught:
        plan_model(small, "100KiB", None, few)
    assert len({s.format for s in plan_model(small, caught.value.smallest, None, few).modules.values()}) == 1
    assert caught.value.smallest < least.peak


@pytest.mark.parametrize("name", registry.names("planners"))
def test_every_planner_plans(small: Path, name: str) -> None:
    """What `finebits list` prints under planners, as a recipe names it: within a budget, from one width of several blocks."""
    blocks = tuple(fb.NF(4, block=b, scale="bf16") for b in (16, 32, 64))
    planner = registry.from_json("planners", name)
    free = plan_model(small, None, None, settings(planner=planner, formats=blocks))
    made = plan_model(small, free.peak - 4_000, None, settings(planner=planner, formats=blocks))
    assert made.peak <= free.peak - 4_000 and made.solver["planner"]["paper"] == made.solver["name"] == name
    assert same(again(Plan.from_json(made.to_json())), made)


def test_planners_are_not_passed_over_without_a_budget(small: Path) -> None:
    made = plan_model(small, None, None, settings(planner=fb.Uniform()))
    assert made.solver["name"] == "uniform" and len({s.format for s in made.modules.values()}) == 1
    assert plan_model(small, None, None, settings(planner=fb.DP())).solver["name"] == "unbounded"
    near, exact = (plan_model(small, made.peak - 20_000, None, settings(planner=p)) for p in (fb.Lagrange(), fb.DP()))
    assert exact.solver["name"] == "dp" and exact.solver["loss"] <= near.solver["loss"] + 1e-12


def test_a_serve_budget_stays_when_the_plan_is_solved_again(small: Path) -> None:
    free = plan_model(small, None, ROWS, settings(serve_budget=10**9))
    whole = free.solver["serve"]["planned"]
    for more in ({}, {"ranks": (2, 8), "init": fb.LoftQ(steps=1)}):
        made = plan_model(small, free.peak + 100_000, ROWS, settings(serve_budget=whole - 15_000, levers=PULLS, **more))
        assert made.solver["serve"]["planned"] <= whole - 15_000
        assert same(again(Plan.from_json(made.to_json())), made)
        rows = {r["name"]: r for r in made.solver["alternatives"]}
        assert rows["8 bits everywhere"]["saved"] > 0 and "saved +" in made.summary()
        assert all(r["saved"] == 0 for name, r in rows.items() if name.startswith("mixed"))


def test_a_serve_budget_that_only_constraints_exceed(small: Path) -> None:
    locks = {"down_proj": FORMATS[3]}
    with pytest.raises(ValueError, match="no choice keeps to at most 1 formats") as refused:
        plan_model(small, None, None, settings(planner=fb.MILP(formats=1), locks=locks | {"up_proj": fb.NF(2, 32)}))
    assert refused.value.code == 2  # type: ignore[attr-defined]
    tied = settings(planner=fb.MILP(ties=(("down_proj", "up_proj"),)), locks=locks)
    free = plan_model(small, None, None, settings(serve_budget=10**9, formats=FORMATS[:1], locks=locks))
    with pytest.raises(Infeasible, match=r"can be saved \(the smallest that its planner may choose\) takes .*, the serve budget is"):
        plan_model(small, None, None, Settings(**vars(tied) | {"serve_budget": free.solver["serve"]["planned"]}))


def test_the_predicted_kl_follows_the_budget(small: Path) -> None:
    made = plan_model(small, None, ROWS, settings(objective="kl"), pareto=4)
    less = again(Plan.from_json(made.to_json()), budget=made.peak - 30_000, pareto=4)
    assert less.solver["kl"]["interval"][1] > made.solver["kl"]["interval"][1]
    assert less.solver["kl"]["variants"] == made.solver["kl"]["variants"] and all("kl" in p for p in less.solver["pareto"])


def test_what_cannot_be_had_together_is_refused(small: Path) -> None:
    config = Path(__file__).parent.parent / "data" / "configs" / "qwen3-8b"
    refused: list[tuple[dict[str, Any], str]] = [
        (dict(objective="kl", ranks=(2, 4)), "ranks cannot be chosen under it: use fisher"),
        (dict(objective="kl", inits=(fb.Zeros(), fb.LoftQ())), "starts cannot be chosen under it"),
        (dict(objective="kl", quantizer=fb.GPTQ()), "GPTQ needs statistics"),
        (dict(planner=fb.Uniform(), locks={"down_proj": None}), "gives all matrices one candidate: leave quantization.locks or overrides"),
        (dict(planner=fb.BlockSize(overhead=0.05), ranks=(2, 4)), "at one code width: leave adapter.ranks out"),
        (dict(planner=fb.DP(), ranks=(2, 4), serve_budget=10**9), "a second limit that dp does not keep: take the planner milp"),
        (
            dict(planner=fb.EVARanks()),
            "eva_ranks gives out ranks and no bits: write adapter.ranks=eva_ranks, and take the planner lagrange",
        ),
        (dict(planner=fb.DiffoRA()), "diffora gives out ranks and no bits: write adapter.ranks=diffora"),
        (dict(ranking=fb.EVARanks(), ranks=(2, 4)), "before the bits are chosen, or chosen with them"),
        (dict(refine=(fb.ApiQ(clip=0.01),), quantizer=fb.GPTQ()), "undo what GPTQ has found: take rtn, or use its scales"),
        (dict(refine=(fb.ApiQ(clip=0.01),), init=fb.LoftQ(steps=2)), "LoftQ rounds what it leaves beside the adapter: take qera"),
        (dict(refine=(fb.ApiQ(clip=0.01),), overrides={".*": fb.Ternary(32)}), "Ternary.* has none: offer nf or int"),
        (dict(refine=(fb.EfficientQAT(),), overrides={".*": fb.NF(4)}), "EfficientQAT rounds weights to integers, and NF.* offer int"),
        (dict(refine=(fb.PVTuning(),)), "PVTuning moves codes among the words of codebooks"),
        (dict(planner=fb.MILP(latency=1.0)), "plans of models do not: leave latency out"),
    ]
    for more, said in refused:
        with pytest.raises(Mistake, match=said) as caught:
            plan_model(small, "1GiB", ROWS, settings(**more))
        assert caught.value.code == 2
    with pytest.raises(Mistake, match="an 8-bit head is priced by its weight error") as caught:
        plan_model(config, None, ROWS, settings(objective="fisher", levers=("head",)))
    for more in (dict(ranks=(2, 4)), dict(inits=(fb.Zeros(),)), dict(serve_budget=10**9)):
        with pytest.raises(Mistake, match="within one budget: leave"):
            compare("1GiB", [str(small)], settings(**more), lambda done, total, name: None)
    with pytest.raises(Mistake, match="the objective kl counts nats on rows, and there are none"):
        compare("1GiB", [str(small)], settings(objective="kl"), lambda done, total, name: None)
    assert set(names()) == set(plan_model(small, None, None, settings()).modules)


def test_models_are_compared_under_the_recipes_objective(small: Path, small_untied: Path) -> None:
    quiet = lambda done, total, name: None  # noqa: E731
    config = small_untied.parent / "config alone"
    config.mkdir(exist_ok=True)
    (config / "config.json").write_bytes((small_untied / "config.json").read_bytes())
    models = [str(small), str(small_untied)]
    by = {o: compare("1GiB", models, settings(objective=o), quiet, data=ROWS) for o in ("weight", "output", "fisher", "kl")}
    assert {o.basis for o in by["weight"]} == {"rule of thumb on measured weight errors"}
    assert {o.basis for o in by["output"]} == {"rule of thumb on measured output errors"}
    assert all(o.predicted is None for o in by["weight"] + by["output"]) and all(o.measured for o in by["output"])
    for o in by["fisher"] + by["kl"]:
        assert o.predicted is not None and o.predicted[0] <= o.predicted[1] <= o.predicted[2] and o.effective < o.parameters  # type: ignore[operator]
    assert [o.predicted[1] for o in by["kl"]] == sorted(o.predicted[1] for o in by["kl"])  # type: ignore[index]
    mixed = compare("1GiB", [*models, str(config)], settings(objective="fisher"), quiet, data=ROWS)
    assert {o.model: o.basis.partition(":")[0] for o in mixed}[str(config)] == "rule of thumb on typical errors"
    assert [o.effective for o in mixed] == sorted((o.effective for o in mixed), reverse=True)  # type: ignore[type-var]
    only = compare("1GiB", [str(config)], settings(objective="kl"), quiet, fast=True)
    assert only[0].basis.startswith("rule of thumb on typical errors")
