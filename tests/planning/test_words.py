"""A plan is the same whoever asks for it: a recipe, keyword arguments, the objects of other libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

import finebits as fb
from finebits.data.rows import read
from finebits.errors import Invalid
from finebits.plan.base import Plan
from finebits.recipe import Recipe, RecipeError, call
from finebits.recipe.settings import Settings

ROWS = [" ".join(f"w{(i * j) % 120 + 1}" for j in range(6 + i % 7)) for i in range(1, 31)]
WORDS: dict[str, Any] = dict(candidates=["nf2-b32", "nf4-b32"], max_length=24, rank=4, init="zeros", dtype="float32", samples=0, to=[])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {"rows": tmp_path / "rows.jsonl", "held": tmp_path / "held.jsonl"}
    for path, some in zip(found.values(), (ROWS[:20], ROWS[20:]), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    return found


def test_the_command_and_the_call_make_one_plan(small: Path, files: dict[str, Path], tmp_path: Path) -> None:
    from finebits.cli import main

    said = {"model": {"model_name_or_path": str(small)}, "budget": {"memory": "3.4 bits"}, "output_dir": str(tmp_path / "run")}
    said["data"] = {"datasets": [{"path": str(files["rows"])}], "held_out": {"path": str(files["held"])}}
    (tmp_path / "r.yaml").write_text(json.dumps(said))
    assert main(["--format", "quiet", "plan", str(tmp_path / "r.yaml"), *(f"{k}={json.dumps(v)}" for k, v in WORDS.items())]) == 0
    command = Plan.load(tmp_path / "run" / "plan.json")
    named = fb.plan_model(small, "3.4 bits", **said["data"], **WORDS, pareto=24)
    rows, held = read(files["rows"]), read(files["held"])
    made = WORDS | {"candidates": [fb.NF(2, 32), fb.NF(4, 32)], "adapter": fb.LoRA(), "init": fb.Zeros()}
    called = fb.plan_model(small, "3.4 bits", rows, held_out=held, **made, pareto=24)
    assert command.hash == named.hash == called.hash
    assert fb.plan_model(small, "3.4 bits", rows, held_out=held, **made | {"rank": 8}, pareto=24).hash != command.hash


def test_what_is_not_said_is_as_in_a_recipe_that_does_not_say() -> None:
    recipe = Recipe.parse("{model: {model_name_or_path: m}, budget: {memory: 1TiB}}")
    assert vars(Settings()) == vars(Settings.of(recipe)) and Settings().max_length == recipe.data.max_length
    assert vars(Settings(max_length=7)) == vars(Settings()) | {"max_length": 7}
    with pytest.raises(Invalid, match="Settings have no max_lenght: did you mean max_length"):
        Settings(max_lenght=7)


def test_mistakes_in_words_are_those_of_a_recipe(small: Path) -> None:
    for words, said in (
        ({"max_lenght": 7}, "max_lenght is not a known key(.|\n)*did you mean data.max_length"),
        ({"cutoff_len": 7}, "data.max_length"),
        ({"max_length": "long"}, "max_length wants a whole number"),
        ({"init": "lofq"}, "lofq"),
        ({"seed": object()}, "seed wants a value that a recipe could hold.* and a object came"),
        ({"memory": "1GiB"}, "memory is the budget, which the call names already"),
    ):
        with pytest.raises(Invalid, match=said):
            fb.plan_model(small, "1GiB", fast=True, **words)
    with pytest.raises(RecipeError, match="does not say what is meant"):
        call.recipe("m", 3, {})
    with pytest.raises(ValueError, match="settings are given, and max_length beside them"):
        fb.plan_model(small, None, None, Settings(), max_length=7)


def test_objects_of_other_libraries_say_what_they_would_do() -> None:
    args = SFTConfig("out", use_cpu=True, max_length=300, learning_rate=1e-3, gradient_accumulation_steps=2, warmup_steps=0.1)
    lora = LoraConfig(r=16, lora_alpha=32, use_rslora=True, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    found = call.recipe("m", None, {"candidates": ["nf4"]}, args, lora)
    assert (found.data.max_length, found.data.assistant_only_loss, found.training.learning_rate) == (300, False, 1e-3)
    assert found.training.per_device_train_batch_size == 8 and found.training.optim == "adamw_torch" and found.budget.device == "cpu"
    assert found.training.warmup_steps == 0.1 and found.training.gradient_checkpointing
    assert Settings.of(found).adapter == fb.LoRA(rank=16, alpha=32.0, scaling="rslora") and Settings.of(found).init == fb.Zeros()
    assert Settings.of(found).dropout == 0.1
    packs = call.recipe("m", None, {}, SFTConfig("out", use_cpu=True, packing=True, adam_beta1=0.5, eval_strategy="steps", eval_steps=5))
    assert packs.data.packing and (packs.training.adam_beta1, packs.training.eval_strategy, packs.training.eval_steps) == (0.5, "steps", 5)
    plain = call.recipe("m", None, {}, TrainingArguments("out", use_cpu=True), LoraConfig(target_modules=["v_proj", "q_proj"]))
    assert not plain.training.gradient_checkpointing and plain.adapter.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("words", "args", "lora", "said"),
    [
        (
            {},
            dict(padding_free=True),
            {},
            "SFTConfig asks for padding_free=True, which finebits does not do: leave it at padding_free=False",
        ),
        (
            {},
            dict(group_by_length=True) if "group_by_length" in SFTConfig.__dataclass_fields__ else dict(use_liger_kernel=True),
            {},
            "=True",
        ),
        ({}, dict(optim="lomo"), {}, "training.optim wants adamw, adamw_8bit, "),
        ({"max_length": 9}, {}, {}, "max_length=9 is given, and 1024 by an object beside it"),
        ({"r": 9}, {}, {}, "r=9 is given, and 8 by an object beside it"),
        ({"adapter": fb.LoRA()}, {}, {}, "say it once"),
        ({}, {}, dict(lora_bias=True), "LoraConfig asks for lora_bias=True"),
        ({}, {}, dict(target_modules=None), "by which PEFT picks modules itself"),
        ({}, {}, dict(task_type="SEQ_CLS"), "SEQ_CLS"),
    ],
)
def test_what_cannot_be_honoured_is_refused(words: dict[str, Any], args: dict[str, Any], lora: dict[str, Any], said: str) -> None:
    with pytest.raises(Invalid, match=said) as caught:
        call.recipe("m", None, words, SFTConfig("out", use_cpu=True, **args), LoraConfig(**{"target_modules": "all-linear"} | lora))
    assert getattr(caught.value, "code", 2) == 2


def test_a_class_is_no_object_of_it() -> None:
    with pytest.raises(Invalid, match="training_args is a type, and a TrainingArguments or SFTConfig is what is read"):
        call.recipe("m", None, {}, SFTConfig)
