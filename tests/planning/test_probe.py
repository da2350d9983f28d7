"""A plan is calibrated by training its worst batches once, and training follows the plan's levers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finebits import job
from finebits.data.tokens import to_batch, tokenize
from finebits.interop.planning import batches, scored
from finebits.interop.tokenizer import tokenizer_of
from finebits.losses import IGNORED
from finebits.meter import MALLOC
from finebits.plan import memory
from finebits.plan.base import Plan
from finebits.plan.levers import Counted, Levers, Workload
from finebits.recipe import Recipe, RecipeError
from finebits.recipe.rows import rows_of
from finebits.recipe.settings import Settings
from finebits.run.material import tokenized
from finebits.run.plans import priced, probed
from finebits.run.probe import worst
from finebits.run.source import Source
from finebits.run.tune import arguments_of
from finebits.tasks.causal_lm import CausalLM
from finebits.train import met
from tiny_llama import worded

RECIPE = """
model: {{model_name_or_path: {model}, dtype: float32}}
budget: {{memory: 400MiB, levers: [micro_batch, loss_chunk]}}
data: {{datasets: [{{path: {rows}, format: text}}], max_length: 96, test_split_size: 0.2}}
quantization: {{candidates: [nf2-b32-bf16, nf4-b32-bf16], objective: weight}}
adapter: {{rank: 4, alpha: 4, init: zeros}}
training: {{max_steps: 3, per_device_train_batch_size: 4, gradient_accumulation_steps: 1}}
evaluation: {{samples: 0}}
output_dir: {out}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A tiny Llama and forty rows of 10 to 75 words."""
    root = tmp_path_factory.mktemp("probe")
    model = worded(root / "llama", tie_word_embeddings=True)
    rows = root / "rows.jsonl"
    lengths = [10 + (7 * i) % 66 for i in range(40)]
    rows.write_text(
        "".join(json.dumps({"text": " ".join(f"w{(i * j) % 120 + 1}" for j in range(n))}) + "\n" for i, n in enumerate(lengths))
    )
    return Recipe.parse(RECIPE.format(model=model, rows=rows, out=root / "out"))


def test_the_worst_batches_of_the_run_are_counted(recipe: Recipe) -> None:
    rows = rows_of(recipe)[0]
    levers = Levers(dtype="bfloat16")
    found = batches(Path(recipe.model.model_name_or_path), rows, Settings.of(recipe), levers)
    assert found["batches"].keys() == {"4", "2", "1"}  # for every micro-batch that the plan may choose
    for b, counted in found["batches"].items():
        (longest, labelled, *_), *_ = sorted(counted["worst"], reverse=True)
        assert (
            counted["widths"] in (1, 2) and longest == 128 and int(b) * 60 < labelled < int(b) * 76
        )  # padded to a multiple of 64; the longest come first
    assert sum(n for _, n in found["lengths"]) == len(rows)
    short = batches(
        Path(recipe.model.model_name_or_path),
        rows,
        Settings.of(recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 48})})),
        levers,
    )
    longest, tokens = short["batches"]["4"].pop("calibration")
    assert short["batches"]["4"] == {"worst": [[64, 4 * 47, 1]], "widths": 1}
    alone = short["batches"]["1"]["calibration"]  # row by row there is no padding
    assert longest == alone[0] == 48 and alone[1] < tokens < alone[1] + 4 * 48


def test_scoring_is_planned_with_the_rows_that_are_scored(recipe: Recipe) -> None:
    folder, held = Path(recipe.model.model_name_or_path), rows_of(recipe)[1]
    levers = Levers(max_length=128)
    examples = sorted(tokenize(held, tokenizer_of(folder), 128, True), key=lambda e: -len(e.input_ids))
    met = [to_batch(examples[i : i + 3], 0, 8) for i in range(0, len(examples), 3)]
    labels = max(int((b["labels"][:, 1:] != IGNORED).sum()) for b in met)
    found = scored(folder, held, Settings(per_device_eval_batch_size=3, max_length=128), levers)
    assert found == [*met[0]["input_ids"].shape, labels]
    assert memory.scored(Workload(levers, Counted(scored=found)))[:4] == (*found, 1)
    assert memory.scored(Workload(Levers(max_length=16), Counted(scored=found))).tokens == 16
    assert priced(recipe, rows_of(recipe)).counted.scored[0] == min(recipe.evaluation.per_device_eval_batch_size, len(held))


def test_a_probe_sees_the_optimizer_state() -> None:
    """Rows of one length: the first batch, and after it the one with most labels."""
    labels = [[0] * (1 + i % 37) for i in range(40)]
    training = SimpleNamespace(seed=1, max_steps=6, num_train_epochs=1.0)
    part: Any = SimpleNamespace(
        units=SimpleNamespace(lengths=[50] * 40, labelled=[len(row) - 1 for row in labels]),
        recipe=SimpleNamespace(training=training, objective_value=lambda: None),
        plan=SimpleNamespace(levers=Levers(dtype="bfloat16")),
        task=CausalLM(),
    )
    for passes in (1, 2):
        found, run = worst(part, 4, passes), met([50] * 40, 4, 1, passes, 6, 1.0)
        most = max(run[passes:], key=lambda b: sum(len(labels[r]) for r in b))
        assert found == [run[0], most]
    training.max_steps = 1
    assert worst(part, 4, 1) == met([50] * 40, 4, 1, 1, 1, 1.0)


def test_a_probe_replaces_the_constant(recipe: Recipe) -> None:
    made = job.plan(recipe, probe=True)
    out = Path(recipe.output_dir)
    probe, found = json.loads((out / "probe.json").read_text()), Plan.load(out / "plan.json")
    assert found.to_json() == made.to_json() and probe["settings"] == MALLOC and 1 < probe["steps"] <= 8
    if probe["peaks"]["train"] > probe["planned"] - 72 * 2**20:  # the tiny model itself takes next to nothing
        assert made.memory["runtime"] == made.counted.runtime == probe["runtime"]
        assert made.peak == probe["peaks"]["train"]  # the same bits: the smallest menu is all that there is
    assert made.solver["probed"] == {"planned": probe["planned"], "measured": probe["peaks"]["train"]}
    assert made.rows["eval"] == probe["peaks"]["eval"] and "probed" in made.summary()


def test_training_follows_the_plan() -> None:
    r = Recipe.parse("model: {model_name_or_path: m}\ntraining: {per_device_train_batch_size: 8, loss_chunk: 512}")
    pulled = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "loss_chunk": 64}
    arguments, chunk = arguments_of(r, Plan({}, levers=Levers(**pulled)))
    assert chunk == 64 and "loss_chunk" not in arguments and arguments["learning_rate"] == r.training.learning_rate
    assert {k: arguments[k] for k in pulled if k != "loss_chunk"} == {k: v for k, v in pulled.items() if k != "loss_chunk"}


def test_levers_in_a_recipe() -> None:
    head = "model: {model_name_or_path: m}\n"
    assert Recipe.parse(head).budget.levers == ()
    everything = Recipe.parse(head + "budget: {levers: all}")
    assert everything.budget.levers == ("micro_batch", "checkpointing", "loss_chunk", "optim", "head", "embeddings")
    assert Recipe.parse(everything.to_yaml()).budget.levers == everything.budget.levers
    assert Recipe.parse(head, "r", ["budget.levers=[optim]"]).budget.levers == ("optim",)
    with pytest.raises(RecipeError, match="budget.levers"):
        Recipe.parse(head + "budget: {levers: [micro-batch]}")
    with pytest.raises(RecipeError, match="^training.optim is adamw_bnb_8bit, which works on CUDA alone"):
        Recipe.parse(head + "training: {optim: adamw_bnb_8bit}")
    for name in ("adamw_8bit", "adamw_bnb_8bit"):  # ours and transformers'
        assert Recipe.parse(head + f"training: {{optim: {name}}}\nbudget: {{device: cuda}}").training.optim == "adamw_bnb_8bit"
    assert Recipe.parse(head + "training: {optim: sgd}").training.optim == "sgd"


def test_a_probe_of_a_cuda_plan_is_refused(recipe: Recipe) -> None:
    cuda = recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"device": "cuda"})})
    with pytest.raises(ValueError, match="plan without it"):
        probed(cuda, Plan({}, levers=Levers(device="cuda")), tokenized(Source.of(recipe)))
