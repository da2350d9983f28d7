"""Recipes to begin with: the keys that most people change, each with what it does."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import yaml

from finebits.recipe.flags import keys
from finebits.recipe.loading import Recipe
from finebits.recipe.schema import sections
from finebits.recipe.source import Dumper

MODEL, ROWS = "MODEL", "rows.jsonl"  # what a template names where nobody has said
LEVERS = "{model: {model_name_or_path: m}, budget: {levers: all}}"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # what each learns from, and what it says beside COMMON
    "sft": ("conversations, or prompts with answers", {}),
    "preference": ("pairs of a chosen and a rejected answer", {"training.loss": "dpo", "training.learning_rate": 5e-6}),
    "text": ("plain text, every token of it", {"data.assistant_only_loss": False, "adapter.rank": 32}),
    "classification": ("texts with a label", {"task": "classification", "data.max_length": 256, "training.num_train_epochs": 3.0}),
}
COMMON: dict[str, Any] = {
    "model.model_name_or_path": MODEL,
    "budget.memory": "8GiB",
    "budget.device": "auto",
    "budget.levers": ["all"],
    "data.datasets": [{"path": ROWS}],
    "data.max_length": 1024,
    "adapter.rank": 16,
    "adapter.alpha": 16.0,
    "adapter.target_modules": "all-linear",
    "training.num_train_epochs": 1.0,
    "training.learning_rate": 2e-4,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_steps": 0.03,
    "training.per_device_train_batch_size": 4,
    "training.gradient_accumulation_steps": 4,
    "training.seed": 42,
    "training.report_to": "none",
    "evaluation.samples": 3,
    "output_dir": "runs/default",
}
NOTES = {
    "task": "auto would see it by the model's architecture",
    "model.model_name_or_path": "a folder, a hub id, a .gguf file, or package:NAME",
    "budget.memory": "what the whole job may take; or '3.1 bits', or '80% of nf4'",
    "budget.device": "auto is a GPU where there is one",
    "budget.levers": "what else may be changed to leave more for the bits",
    "data.datasets": "{rows}; finebits data check shows what is learned",
    "data.max_length": "tokens; longer rows are cut",
    "data.assistant_only_loss": "false learns every token",
    "adapter.rank": "of the update; alpha / rank scales it",
    "training.loss": "of pairs; the model without its adapter is the reference",
    "training.warmup_steps": "below 1, a share of all steps",
    "training.per_device_train_batch_size": "where the plan begins; the effective batch stays",
    "training.report_to": "none, trackio, tensorboard, wandb, …",
    "evaluation.samples": "held-out prompts to answer before and after",
    "export.to": "adapter, merged, gguf:q4_k_m, …: finebits list --shape export",
    "output_dir": "all results, and report.html",
}


@functools.cache
def kinds() -> tuple[str, ...]:
    """The templates of which this finebits has every key.

    >>> "sft" in kinds()
    True
    """
    return tuple(kind for kind, (_, own) in KINDS.items() if {*own} <= {*keys()})


def template(kind: str, changes: Sequence[str] = ()) -> str:
    """The text of a recipe with comments; `changes` are overrides, whose keys are written out too. Raises RecipeError where these do not fit.

    >>> print(template("sft", ["seed=7"]).splitlines()[-2].strip())
    to: [adapter]                                       # adapter, merged, gguf:q4_k_m, …: finebits list --shape export
    """
    rows, own = KINDS[kind]
    said = COMMON | own
    recipe = Recipe.parse("recipe: 1", "the template", [*(f"{k}={json.dumps(v)}" for k, v in said.items()), *changes], "the command line")
    given = recipe.model_dump(exclude_unset=True)
    given["export"] = given.get("export", {}) | {"to": recipe.export.to}
    shown = [f"{section}.{key}" for section in sections() for key in given.get(section, ())]
    lines = [f"# {kind}: learns from {rows}.", "#   finebits plan FILE     chooses the bits and trains nothing", "#   finebits train FILE"]
    lines += ["# Every other key, with what it does: finebits recipe schema, or finebits recipe show FILE.", "recipe: 1"]
    section = ""
    for key in [k for k in given if k not in sections() and k not in ("recipe", "output_dir")] + shown + ["output_dir"]:
        head, dot, last = key.rpartition(".")
        if dot and head != section:
            lines.append(f"{head}:")
            section = head
        value = given[head][last] if dot else given[key]
        value = "all" if key == "budget.levers" and value == Recipe.parse(LEVERS).budget.levers else value
        text = f"{'  ' if dot else ''}{last}: {flow(value)}"
        note = NOTES.get(key, "").format(rows=rows)
        lines.append(f"{text:<54}# {note}" if note else text)
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """A value on one line of YAML.

    >>> flow(["adapter"]), flow("a: b"), flow(2e-4)
    ('[adapter]', "'a: b'", '0.0002')
    """
    value = list(value) if isinstance(value, tuple) else value
    shown = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=1 << 20, sort_keys=False)
    return " ".join(shown.removesuffix("\n").removesuffix("...").split("\n")).strip()
