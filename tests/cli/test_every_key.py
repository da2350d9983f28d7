"""Every key of a recipe is read by something: another value of it changes what reaches the planner or the trainer, or stands in a line that
reads it, or is refused. A key that is added needs its line here: what else it may be, and who reads it where these two do not."""

import ast
import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import finebits
from finebits.plan.levers import TRAINING
from finebits.recipe import Recipe, RecipeError, flags
from finebits.recipe.settings import Settings
from finebits.run.federated import How
from finebits.run.stage import runs
from finebits.run.tune import arguments_of

SRC = Path(finebits.__file__).parent
BASE = "{model: {model_name_or_path: m}, budget: {memory: 1GiB}, data: {datasets: [{path: a.jsonl}]}}"

OTHER: dict[str, Any] = {  # {key: a value that is not its default}
    "recipe": 2,
    "task": "classification",
    "model.model_name_or_path": "n",
    "model.model_revision": "main",
    "model.dtype": "bfloat16",
    "model.attn_implementation": "eager",
    "budget.memory": "2GiB",
    "budget.device": "cuda",
    "budget.reserve": "7%",
    "budget.serve_memory": "100MiB",
    "budget.serve_adapters": 3,
    "budget.serve_rank": 3,
    "budget.serve_tokens": 3,
    "budget.levers": "all",
    "data.datasets": [{"path": "b.jsonl", "format": "text"}],
    "data.held_out": {"path": "h.jsonl"},
    "data.held_out.path": "h.jsonl",
    "data.test_split_size": 0.5,
    "data.max_length": 64,
    "data.assistant_only_loss": False,
    "data.made_by": "make rows",
    "data.packing": True,
    "data.drop_incomplete": True,
    "data.held_out.name": "main",
    "data.held_out.split": "test",
    "data.held_out.data_files": ["*.csv"],
    "quantization.candidates": ["nf4"],
    "quantization.embeddings": ["nf4"],
    "quantization.objective": "weight",
    "quantization.planner": "uniform",
    "quantization.constraints.tie": [["q_proj", "k_proj"]],
    "quantization.constraints.max_formats": 2,
    "quantization.constraints.overhead": 0.1,
    "quantization.locks": {"lm_head": None},
    "quantization.quantizer": "gptq",
    "quantization.pricing": "rtn",
    "quantization.calibration_rows": 3,
    "quantization.calibration": "sweep",
    "quantization.overrides": {".*": None},
    "adapter.paper": "dora",
    "adapter.folder": "f",
    "adapter.rank": 3,
    "adapter.alpha": 3.0,
    "adapter.choose": ["paca"],
    "adapter.use_rslora": True,
    "adapter.dropout": 0.1,
    "adapter.refine": ["apiq"],
    "adapter.ranks": [2, 4],
    "adapter.inits": ["zeros", "pissa"],
    "adapter.target_modules": ["q_proj"],
    "adapter.exclude_modules": ["q_proj"],
    "adapter.layers_to_transform": [0],
    "adapter.layers_pattern": "layers",
    "adapter.rank_pattern": {"q_proj": 3},
    "adapter.alpha_pattern": {"q_proj": 3.0},
    "adapter.modules_to_save": ["norm"],
    "adapter.trainable_token_indices": [1],
    "adapter.ensure_weight_tying": True,
    "adapter.init": "zeros",
    "training.num_train_epochs": 2.0,
    "training.max_steps": 3,
    "training.learning_rate": 1e-3,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_steps": 0.5,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.effective_batch_size": 4,
    "training.gradient_checkpointing": False,
    "training.max_grad_norm": 0.5,
    "training.weight_decay": 0.5,
    "training.optim": "lion",
    "training.logging_steps": 3,
    "training.save_steps": 3,
    "training.seed": 3,
    "training.report_to": "trackio",
    "training.loss_chunk": 64,
    "training.adam_beta1": 0.8,
    "training.adam_beta2": 0.99,
    "training.adam_epsilon": 1e-6,
    "training.loss": "kto",
    "training.label_smoothing_factor": 0.1,
    "training.neftune_noise_alpha": 5.0,
    "training.lr_scheduler_kwargs": {"num_cycles": 2},
    "training.eval_strategy": "epoch",
    "training.eval_steps": 7,
    "training.eval_on_start": True,
    "training.metric_for_best_model": "margin",
    "training.load_best_model_at_end": True,
    "training.early_stopping_patience": 3,
    "training.early_stopping_threshold": 0.1,
    "training.save_strategy": "epoch",
    "training.save_total_limit": 3,
    "rules": ["ggpo"],
    "federation.aggregators": [{"paper": "lora_fair", "weight": 0.1}],
    "federation.clients": 3,
    "federation.rounds": 3,
    "federation.dirichlet_alpha": 0.5,
    "federation.fraction_train": 0.5,
    "federation.client_dropout": 0.5,
    "federation.client_ranks": [4, 2],
    "federation.clipping_norm": 0.5,
    "federation.noise_multiplier": 2.0,
    "federation.epsilon": 8.0,
    "federation.delta": 1e-3,
    "federation.compare_central": False,
    "evaluation.compare": ["zeros"],
    "evaluation.full_precision": False,
    "evaluation.samples": 0,
    "evaluation.limit": 3,
    "evaluation.per_device_eval_batch_size": 2,
    "export.to": [],
    "export.verify": False,
    "export.tolerance": 0.5,
    "export.rows": 3,
    "export.runtimes.llama_cpp": "env/bin/python",
    "export.runtimes.vllm": "env/bin/python",
    "export.importance": False,
    "export.push_to_hub": True,
    "export.hub_model_id": "me/tuned",
    "export.hub_private_repo": False,
    "export.requantize": "int4-b32",
    "export.requantize.format": "int4-b32",
    "export.requantize.quantizer": "rtn",
    "export.requantize.refine": [],
    "output_dir": "elsewhere",
}
READ = {  # {key that reaches neither the planner's settings nor the trainer's arguments: (file, what stands there)}
    "task": ("run/source.py", "recipe.task"),
    "model.model_name_or_path": ("run/source.py", "recipe.model.model_name_or_path"),
    "budget.memory": ("run/plans.py", "recipe.budget.memory"),
    "data.datasets": ("recipe/rows.py", "recipe.data.datasets"),
    "data.held_out": ("recipe/rows.py", "recipe.data.held_out"),
    "data.held_out.path": ("recipe/rows.py", "recipe.data.held_out"),
    "data.made_by": ("run/source.py", "recipe.data.made_by"),
    "data.test_split_size": ("recipe/rows.py", "recipe.data.test_split_size"),
    "data.held_out.name": ("recipe/rows.py", "held.name"),
    "data.held_out.split": ("recipe/rows.py", "held.split"),
    "data.held_out.data_files": ("recipe/rows.py", "held.data_files"),
    "data.drop_incomplete": ("recipe/rows.py", "recipe.data.drop_incomplete"),
    "training.early_stopping_patience": ("run/tune.py", "t.early_stopping_patience"),
    "training.early_stopping_threshold": ("run/tune.py", "t.early_stopping_threshold"),
    "evaluation.limit": ("recipe/rows.py", "recipe.evaluation.limit"),
    "export.tolerance": ("job.py", "recipe.export.tolerance"),
    "export.rows": ("job.py", "recipe.export.rows"),
    "export.importance": ("job.py", "recipe.export.importance"),
    "export.push_to_hub": ("job.py", "recipe.export.push_to_hub"),
    "export.hub_model_id": ("job.py", "recipe.export.hub_model_id"),
    "export.hub_private_repo": ("job.py", "recipe.export.hub_private_repo"),
    "export.runtimes.llama_cpp": ("job.py", "recipe.export.runtimes"),
    "export.runtimes.vllm": ("job.py", "recipe.export.runtimes"),
    "output_dir": ("job.py", "recipe.output_dir"),
}
EVALUATES = ["training.eval_strategy=steps"]
BESIDE = {  # {key: what a recipe that has it says too}
    "training.eval_steps": EVALUATES,
    "training.load_best_model_at_end": EVALUATES,
    "training.early_stopping_patience": EVALUATES,
    "training.early_stopping_threshold": [*EVALUATES, "training.early_stopping_patience=2"],
    "training.metric_for_best_model": [*EVALUATES, "training.loss=kto"],
    "data.held_out.name": ["data.held_out.path=h"],
    "data.held_out.split": ["data.held_out.path=h"],
    "data.held_out.data_files": ["data.held_out.path=h"],
}
REFUSED = {"recipe"}  # whose other values are


def inputs(recipe: Recipe) -> str:
    """All that planner, trainer, exporter and federation are handed of a recipe's settings."""
    settings = Settings.of(recipe)
    levers = SimpleNamespace(**{key: getattr(settings, key) for key in TRAINING})
    arguments, chunk = arguments_of(recipe, SimpleNamespace(levers=levers))
    values = {f.name: repr(getattr(settings, f.name)) for f in fields(settings)}
    return json.dumps(
        [
            values,
            {k: repr(v) for k, v in sorted(arguments.items())},
            chunk,
            runs(recipe),
            repr(recipe.requantize_value()),
            repr(How.of(recipe)),
        ]
    )


def test_every_key_has_another_value_here():
    missing = sorted({*flags.keys()} - {*OTHER})
    assert not missing, f"{', '.join(missing)}: add another value to OTHER, and to READ who reads it if neither planner nor trainer does"
    gone = sorted({*OTHER} - {*flags.keys()})
    assert not gone, f"{', '.join(gone)}: no such keys any more"


@pytest.mark.parametrize("key", sorted({*flags.keys()} & {*OTHER}))
def test_a_key_is_read(key):
    more = ["export.to=[gptq]", "export.requantize={format: int4-b64}"] if key.startswith("export.requantize") else BESIDE.get(key, [])
    change = f"{key}={json.dumps(OTHER[key])}"
    if key in REFUSED:
        with pytest.raises(RecipeError):
            Recipe.parse(BASE, overrides=[change])
        return
    changed = Recipe.parse(BASE, overrides=[*more, change])
    if key in READ:
        file, line = READ[key]
        assert line in (SRC / file).read_text(), f"{key}: nothing in {file} reads {line}"
        return
    before = Recipe.parse(BASE, overrides=more[: 1 if key == "export.requantize" else 2])
    assert inputs(changed) != inputs(before), f"{key} changes nothing that a run is handed: read it, or take the key away"


def test_arguments_of_the_trainer_are_all_its_own():
    found = importlib.util.find_spec("transformers")
    assert found is not None and found.origin is not None
    module = ast.parse(Path(found.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    theirs = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    names = {node.target.id for node in theirs.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    recipe = Recipe.parse(BASE)
    levers = SimpleNamespace(**{key: getattr(Settings.of(recipe), key) for key in TRAINING})
    assert {*arguments_of(recipe, SimpleNamespace(levers=levers))[0]} <= names
