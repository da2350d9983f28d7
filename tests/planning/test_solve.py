"""Bits and levers together, alternatives, solving again, and which model to buy: on priced menus, without a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import finebits as fb
from finebits import registry
from finebits.optim.base import named
from finebits.plan import memory
from finebits.plan.allocation import NEAR
from finebits.plan.base import Infeasible, Plan, Spec
from finebits.plan.compare import ModelChoice, Text, model_choice, ranked, verdict
from finebits.plan.footprint import Footprint
from finebits.plan.levers import PULLS, Workload, in_words, variants
from finebits.plan.problem import menu_of
from finebits.plan.solve import again, asked_of, solve
from finebits.report.page import plan_page, run_page
from finebits.report.text import buys_table
from tiny_llama import geometry_of, llama_config

FORMATS = [fb.NF(b, 64, "bf16") for b in (2, 3, 4)]
ERROR = {2: 0.3, 3: 0.04, 4: 0.009}
GEOMETRY = geometry_of(llama_config(8, 512, 1536, 8, 8, 32000, tied=True), longest=1024)[1]
AROUND = Footprint(GEOMETRY, memory.Trained(900_000, 0, 16), 2 * 10 * 512 * 1536)
LEVERS: dict[str, Any] = dict(
    dtype="bfloat16",
    device="cuda",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    max_length=1024,
    gradient_checkpointing=False,
    loss_chunk=512,
    optim="adamw_torch",
    runtime=2**24,
)
ASKED = Workload.of(LEVERS).levers


def unsolved(budget: int | None, pulls: tuple[str, ...] = (), **levers: Any) -> Plan:
    spec = Spec(format=FORMATS[0], adapter=fb.LoRA())
    costs = {}
    for i in range(10):
        sizes = [(f, f.storage_bits(1536, 512) // 8, ERROR[f.bits] * (1 + i / 3)) for f in FORMATS]
        menu = [{"format": registry.to_json(f), "bytes": size, "loss": loss} for f, size, loss in sizes]
        costs[f"layers.{i}.up"] = {"shape": [1536, 512], "menu": menu}
    footprint = replace(AROUND, pulls=pulls)
    return Plan(
        dict.fromkeys(costs, spec), model="m", budget=budget, costs=costs, sizes=footprint.to_json(), **vars(Workload.of(LEVERS | levers))
    )


def test_levers_pulled_leave_more_for_bits_and_the_effective_batch_stays() -> None:
    budget = solve(unsolved(None)).peak - 10**6
    fixed, free = solve(unsolved(budget)), solve(unsolved(budget, PULLS))
    assert in_words(fixed.levers) == in_words(ASKED) and in_words(free.levers) != in_words(ASKED)
    assert free.solver["loss"] < fixed.solver["loss"] and free.peak <= budget
    for plan in (fixed, free):
        assert plan.levers.per_device_train_batch_size * plan.levers.gradient_accumulation_steps == 16


def test_only_what_may_be_pulled_is() -> None:
    budget = solve(unsolved(None)).peak // 2
    plan = solve(unsolved(budget, ("micro_batch",)))
    assert plan.levers.per_device_train_batch_size < 8
    assert {k: getattr(plan.levers, k) for k in ("gradient_checkpointing", "loss_chunk", "optim")} == {
        k: LEVERS[k] for k in ("gradient_checkpointing", "loss_chunk", "optim")
    }
    with pytest.raises(Infeasible):
        solve(unsolved(budget))


def test_the_levers_that_cost_least_time_win_among_equals() -> None:
    roomy = solve(unsolved(solve(unsolved(None)).peak + 2**20, PULLS))
    assert in_words(roomy.levers) == in_words(ASKED)  # all fits as it is: nothing is pulled
    budget = solve(unsolved(None)).peak // 3
    plan, footprint = solve(unsolved(budget, PULLS)), replace(AROUND, pulls=PULLS)
    slow = {in_words(v): slower for slower, v in variants(ASKED, PULLS)}
    for slower, levers in variants(ASKED, PULLS):
        if slower < slow[in_words(plan.levers)] - 1e-9:
            try:
                other = again(replace(plan, sizes=replace(footprint, pulls=()).to_json(), levers=levers, solver={}))
            except Infeasible:
                continue
            assert other.solver["loss"] > plan.solver["loss"] / NEAR


def test_solving_again_is_solving() -> None:
    free = solve(unsolved(None))
    small = solve(unsolved(free.peak - 10**6, PULLS), pareto=6)
    assert again(small, budget=free.peak - 5 * 10**5).modules == solve(unsolved(free.peak - 5 * 10**5, PULLS)).modules
    assert again(Plan.from_json(small.to_json()), pareto=6).to_json() == small.to_json()
    shorter = again(small, max_length=512)
    assert shorter.levers.max_length == 512 and shorter.solver["loss"] <= small.solver["loss"]
    with pytest.raises(ValueError, match="plan again"):
        again(replace(small, sizes={}))


def test_an_optimizer_with_settings_comes_back_from_the_plan(tmp_path: Path) -> None:
    plan = solve(unsolved(None, optim={"paper": "galore"}))
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read.levers.optim == asked_of(read).optim == named("galore") and again(read).to_json() == plan.to_json()


def test_alternatives_and_the_curve() -> None:
    free = solve(unsolved(None))
    assert [r["name"] for r in free.solver["alternatives"] if r["chosen"]] == ["4 bits everywhere"], "what is no mixture is not called one"
    budget = free.peak - 10**6
    plan = solve(unsolved(budget), pareto=8)
    rows = {r["name"]: r for r in plan.solver["alternatives"]}
    assert {"2 bits everywhere", "3 bits everywhere", "4 bits everywhere", "mixed", "mixed, all levers"} <= rows.keys()
    assert [r["name"] for r in rows.values() if r["chosen"]] == ["mixed"] and rows["mixed"]["peak"] == plan.peak
    assert rows["4 bits everywhere"]["over"] == free.peak - budget and rows["mixed"]["over"] == 0
    assert rows["mixed, all levers"]["loss"] <= rows["mixed"]["loss"]
    peaks, losses = zip(*[(p["peak"], p["loss"]) for p in plan.solver["pareto"]], strict=True)
    assert list(peaks) == sorted(peaks) and list(losses) == sorted(losses, reverse=True) and len(peaks) == 8


def test_the_screen_and_the_page_show_what_else_there_is(tmp_path: Path) -> None:
    plan = solve(unsolved(solve(unsolved(None)).peak - 10**6, PULLS), pareto=8)
    said = plan.summary().splitlines()
    (row,) = [line for line in said if line.startswith(" > ")]
    assert "4 bits everywhere, levers pulled" in row and row.endswith("chosen"), "no mixture is better, and none is named"
    assert any("4 bits everywhere" in line and "no, +" in line for line in said)
    page = plan_page(plan)
    assert 'id="choice"' in page and "Memory against expected loss" in page and "Open circles" in page and page.count("data-tip") > 8
    plan.save(tmp_path / "plan.json")
    (tmp_path / "runs" / "zeros").mkdir(parents=True)
    memory = {"planned": plan.memory, "measured_peak": plan.peak + 2**20, "rows": []}
    (tmp_path / "runs" / "zeros" / "memory.json").write_text(json.dumps(memory))
    assert ">measured</text>" in run_page(tmp_path)
    probed = replace(plan, solver=plan.solver | {"probed": {"planned": 100 * 2**20, "measured": 105 * 2**20}})
    assert "105 MiB measured where 100 MiB was planned (+5.0%)" in probed.summary()


def test_what_could_be_given_up_really_fits() -> None:
    with pytest.raises(Infeasible) as caught:
        solve(unsolved(60 * 2**20, gradient_checkpointing=True, lengths=[[512, 30], [1024, 10]]))
    said = str(caught.value)
    assert "cuts 25.0 % of the rows" in said and caught.value.code == 3
    fits = [line.split()[0] for line in said.splitlines() if " fits" in line]
    assert solve(unsolved(caught.value.smallest, gradient_checkpointing=True)).peak <= caught.value.smallest
    if "budget.levers=all" in fits:
        assert solve(unsolved(60 * 2**20, PULLS, gradient_checkpointing=True)).peak <= 60 * 2**20


def test_a_menu_comes_back_from_the_plan() -> None:
    plan = solve(unsolved(None))
    menu = menu_of(plan)
    assert all([o.spec.format for o in options] == FORMATS and options[0].spec.adapter == fb.LoRA() for options in menu.values())


def test_which_model_to_buy() -> None:
    small = ModelChoice("small", 3 * 10**9, 2.9e9, 4.6, 1)
    large = ModelChoice("large", 8 * 10**9, 0.1e9, 2.3, 1)
    none = ModelChoice("huge", 70 * 10**9, smallest=10**10)
    assert ranked([none, large, small]) == [small, large, none]
    assert verdict(ranked([large, small])).startswith("the smaller model is the better buy: small at 4.6 bits")
    assert verdict([replace(large, effective=6e9), small]) == "the larger model is the better buy: large, even at 2.3 bits"
    assert verdict([replace(large, effective=3e9), small]).startswith("too close to call")
    assert verdict([small, none]) == "small is the only one that fits" and verdict([none]) == "none of them fits"
    plan = solve(unsolved(None))
    made = model_choice("m", 10**8, plan)
    assert made.effective == pytest.approx(10**8 - sum(10 * c["loss"] * 1536 * 512 for c in plan.costs.values()))
    assert made.bits == pytest.approx(4.25)
    assert made.predicted is None and made.basis.startswith("rule of thumb")


def test_predicted_losses_decide_where_all_have_them() -> None:
    """Nats a byte: what a token holds does not matter, and what a rule of thumb would say does not either."""
    nats = replace(unsolved(None), solver={"objective": "kl", "measured": True})
    plan = solve(nats)
    typical = {name: 0.001 for name in plan.costs}
    plan = replace(plan, solver=plan.solver | {"kl": {"interval": [0.1, 0.2, 0.4], "measured": 0.3}})
    small = model_choice("small", 10**8, plan, text=Text(3.0, 1000, 4000), typical=typical)
    assert small.predicted == pytest.approx((3.1 / 4, 3.3 / 4, 3.4 / 4)) and small.basis == "measured loss + predicted KL"
    assert small.effective == pytest.approx(10**8 * (1 - 0.01), rel=0.01)
    large = model_choice("large", 10**9, plan, text=Text(2.9, 2000, 4000), typical=typical)  # more tokens for the same text
    assert ranked([large, small]) == [small, large] and verdict([small, large]).startswith("the smaller model is the better buy")
    near = replace(large, model="near", predicted=(0.84, 0.86, 0.9))
    assert verdict(ranked([near, small])).startswith("too close to call between small")
    fisher = replace(plan, solver={"objective": "fisher", "loss": 0.5, "measured": True})
    point = model_choice("point", 10**8, fisher, text=Text(3.0, 1000, 4000), typical=typical)
    assert point.predicted == (3.5 / 4,) * 3 and "Fisher" in point.basis
    thumb = ModelChoice("thumb", 2 * 10**9, 1.9e9, 4.0, 1, basis="rule of thumb")
    assert ranked([small, large, thumb])[0] is thumb  # one of them without a prediction: the rule of thumb for all
    said = buys_table(ranked([small, large, thumb]), "v", 2**30, "cpu")
    assert "do not decide" in said and "0.825 [0.775, 0.850]" in said and "rule of thumb;" in said
    assert "tokenizers do" in buys_table([small, large], "v", 2**30, "cpu") and "nats a byte" not in buys_table([thumb], "v", 2**30, "cpu")
