"""What a dry run says is what the run does; evaluation while training has its place in the plan."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from finebits.data.arrays import Tokens
from finebits.plan import memory
from finebits.plan.levers import Counted, Levers, Workload, variants
from finebits.recipe import Recipe
from finebits.run.ahead import Ahead, ahead, speed
from finebits.run.material import Material
from finebits.tasks.causal_lm import CausalLM
from tiny_llama import geometry_of, llama_config
from training.small import rows


def of(*overrides: str, count: int = 12) -> Ahead:
    recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=["training.eval_strategy=epoch", *overrides])
    tokens = Material(Tokens.of(rows(count), 64, True), Tokens.of(rows(2), 64, True), (), "")
    levers = Levers(per_device_train_batch_size=2, gradient_accumulation_steps=3, gradient_checkpointing=True)
    sizes = {"geometry": {"vocabulary": 100, "observed": {"hidden": 8}}}
    plan: Any = SimpleNamespace(levers=levers, costs={"a": {"shape": (8, 16)}, "b": {"shape": (8, 8)}}, sizes=sizes)
    return ahead(recipe, plan, tokens, CausalLM())


def test_two_epochs_are_counted_by_hand() -> None:
    found, lengths = of("num_train_epochs=2"), [len(e.input_ids) for e in rows(12)]
    assert (found.steps, found.rows, found.evaluations) == (4, 6, 2)
    assert found.tokens == 2 * sum(lengths) and found.labels == 2 * sum(n - 3 for n in lengths)
    assert found.operations == 2 * 3 * (8 * 16 + 8 * 8) * found.padded + 4 * 100 * 8 * found.labels


def test_max_steps_decides() -> None:
    found = of("max_steps=5", "training.eval_strategy=steps", "training.eval_steps=2", "training.eval_on_start=true")
    assert (found.steps, found.evaluations) == (5, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_while_training_is_planned(dtype: str) -> None:
    """Beside the optimizer's state: a large batch of held-out rows can be the peak, and is no more than a part of it otherwise."""
    _, g = geometry_of(llama_config(2, 64, 96, 4, 2, 512), dtype=dtype, longest=64)
    levers, trained = Levers(dtype=dtype, max_length=64, per_device_train_batch_size=1), memory.Trained(1000, 0, 16)
    peak = lambda counted: sum(memory.terms(g, 10_000, trained, Workload(levers, counted)).values())  # noqa: E731
    small, large = Counted(scored=(1, 8, 4)), Counted(scored=(256, 64, 8000))
    assert peak(small) == peak(large) == peak(replace(small, evaluated=True)) < peak(replace(large, evaluated=True))
    moment = memory.moments(g, 10_000, trained, Workload(levers, replace(large, evaluated=True)))["evaluation"]
    assert moment["optimizer"] > 0 and moment["activations"] >= g.observed.forward(memory.scored(Workload(levers, large)))


def test_pairs_are_never_cut() -> None:
    levers = Levers(per_device_train_batch_size=8, together=2)
    sizes = {v.per_device_train_batch_size for _, v in variants(levers, ["micro_batch"])}
    assert sizes == {8, 4, 2}


def test_time_and_tokens_are_said_by_epoch_and_by_step() -> None:
    found = of("num_train_epochs=2")
    assert found.epochs == 2 and f", {found.tokens / 4:,.0f} a step)" in found.lines(None)[0] and len(found.lines(None)) == 1
    assert "at least 17 min of training, 8 min an epoch" in replace(found, operations=1000e9).lines(1e9)[1]
    assert found.rules == () and len(found.lines(1e9)) == 2
    found = of("rules=[lora_plus, {paper: layer_drop, p: 0.1}]")
    assert found.lines(1e9)[2] == "not counted in it: the rules LoRAPlus, LayerDrop"
    found = speed(Levers())
    assert found is not None and found > 0


def test_packs_are_counted_as_packs() -> None:
    rows, packs = of(), of("data.packing=true", "data.max_length=64")
    assert packs.steps < rows.steps and packs.labels == rows.labels
