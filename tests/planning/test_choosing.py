"""The planner chooses the adapter: by what each takes to the byte, and what that leaves to the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.interop.choosing import taken
from finebits.interop.selecting import Mistake
from finebits.optim._shell import made
from finebits.optim.base import named
from finebits.plan.base import Infeasible
from finebits.recipe import Recipe
from finebits.report.text import plan_summary
from finebits.tasks import base as tasks

LORA, PACA = {"paper": "lora", "rank": 16}, {"paper": "paca", "rank": 4}
BITS = ["nf2-b32", "nf3-b32", "nf4-b32"]


def planned(small: Path, budget: Any, **said: Any) -> fb.Plan:
    more: dict[str, Any] = dict(max_length=32, per_device_train_batch_size=2, candidates=BITS, dtype="float32", reserve="0") | said
    return fb.plan_model(str(small), budget, fast=True, **more)


def needs(small: Path, entry: Any, bits: str) -> int:
    return planned(small, None, choose=[], adapter=entry, candidates=[bits]).need


def test_each_is_priced_to_the_byte_as_if_it_were_the_only_one(small: Path) -> None:
    entries = [LORA, {"paper": "vera", "rank": 8}, "prefix_tuning", {"paper": "mixlora", "rank": 4}, "full"]
    budget = 2 * needs(small, LORA, "nf4-b32")
    plan = planned(small, budget, choose=entries)
    lines = plan.solver["adapters"]
    assert [line["chosen"] for line in lines] == [True, False, False, False, False] and all(line["fits"] for line in lines), (
        "the first of equals"
    )
    assert fb.Plan.from_json(plan.to_json()) == plan
    for entry, line in zip(entries, lines, strict=True):
        alone = planned(small, budget, adapter={"paper": entry} if isinstance(entry, str) else entry)
        assert line["needs"] == alone.need and line.items() >= taken(alone).items()
        assert "adapters" not in alone.solver
        model, _ = fb.load_planned(alone)
        optimizer = made(named("adamw"), [p for p in model.parameters() if p.requires_grad], 0.01)
        stored = {t.untyped_storage()._cdata: t.nbytes for n, t in model.state_dict(keep_vars=True).items() if ".p." in n or n[:2] == "p."}
        tasks.of(model).loss(model, tiny.batches()[0]).backward()
        optimizer.step()
        held = [t for state in optimizer.state.values() for k, t in state.items() if torch.is_tensor(t) and t.ndim]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert line["parameters"] == sum(stored.values()), entry
        assert line["gradients"] == sum(g.nbytes for g in gradients) and line["optimizer"] == sum(t.nbytes for t in held), entry
        assert line["activations"] > 0 and line["trained"] == sum(g.numel() for g in gradients)
    said = plan_summary(plan)
    assert "Adapters to choose from" in said and "goes by memory alone" in said and "mixlora" in said


def test_the_one_that_leaves_the_weights_most_is_taken(small: Path) -> None:
    budget = needs(small, LORA, "nf2-b32") + 5000
    plan = planned(small, budget, choose=[{"paper": "lora", "rank": 48}, LORA, PACA])
    first, second, third = plan.solver["adapters"]
    assert not first["fits"] and first["needs"] > plan.budget and "loss" not in first
    assert third["chosen"] and third["loss"] == plan.solver["loss"] < second["loss"] and third["bits"] > second["bits"]
    assert {type(s.adapter) for s in plan.modules.values()} == {fb.PaCA}
    assert "no, needs" in plan_summary(plan)
    one = planned(small, budget, adapter=PACA)
    assert one.modules == plan.modules and one.memory == plan.memory


def test_none_fits(small: Path) -> None:
    with pytest.raises(Infeasible, match=r"with any adapter of adapter.choose: the smallest plan, with paca, needs(.|\n)*  lora +needs"):
        planned(small, "30MiB", choose=[LORA, PACA])


@pytest.mark.parametrize(
    ("budget", "said", "why"),
    [
        ("3 bits", {}, "adapter.choose takes the adapter that leaves the weights most of budget.memory, and that is 3 bits"),
        (None, {}, "and that is without a limit: state it in bytes"),
        ("1GiB", {"ranks": [2, 4]}, "adapter.choose and adapter.ranks are two choices"),
        ("1GiB", {"inits": ["zeros", "loftq"]}, "adapter.choose and adapter.inits are two choices"),
        ("1GiB", {"dropout": 0.1, "choose": ["lora", "ia3"]}, "adapter.choose.1: dropout of the inputs has no meaning for IA3"),
    ],
)
def test_what_gives_nothing_to_choose_by_is_refused(small: Path, budget: Any, said: dict[str, Any], why: str) -> None:
    with pytest.raises(Mistake, match=why):
        planned(small, budget, **{"choose": ["lora", "paca"]} | said)


def test_a_recipe_of_several(small: Path) -> None:
    def recipe(*said: str) -> Recipe:
        return Recipe.parse(f"model: {{model_name_or_path: {small}}}", overrides=said)

    several = recipe("adapter.choose=[paca, {paper: lora, rank: 4, init: pissa}]", "adapter.choose.0.rank=2")
    assert Recipe.parse(several.to_yaml()) == several
    assert several.choices() == [(fb.PaCA(rank=2), fb.Zeros()), (fb.LoRA(rank=4), fb.PiSSA())]
    lines = [{"adapter": {"paper": "lora", "rank": 4, "alpha": 16.0, "scaling": "lora"}, "init": {"paper": "pissa"}, "chosen": True}]
    one = several.settled(fb.Plan({}, solver={"adapters": lines}))
    assert (one.adapter_value(), one.init_value(), one.adapter.choose) == (fb.LoRA(rank=4), fb.PiSSA(), [])
    with pytest.raises(ValueError, match=r"lets the planner choose an adapter .* made without: plan again"):
        several.settled(fb.Plan({}))
    for said, why in (
        (["choose=[lora, paca]", "adapter.rank=4"], "adapter.choose.0: adapter.rank is of one adapter, and adapter.choose gives several"),
        (["choose=[lora, pacca]"], "adapter.choose.1: .*Did you mean 'paca'"),
        (["choose=[{paper: lora, rnk: 4}]"], "adapter.choose.0: lora has no setting 'rnk'"),
        (["choose=[lora, paca]", "rules=[lora_plus]"], r"LoRAPlus acts on .*, and PaCA has none such"),
        (["choose=[lora, {paper: paca, init: loftq}]"], "adapter.choose.1: "),
    ):
        with pytest.raises(ValueError, match=why):
            recipe(*said)
