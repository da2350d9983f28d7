"""What a job learns from and is scored on. Files are parsed and rows tokenized once, by the gate; the planner is handed the arrays, and every
process of the job reads them from the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finebits import files
from finebits.data import arrays
from finebits.data.arrays import Tokens
from finebits.data.check import Check, require
from finebits.data.rows import Rows
from finebits.errors import Invalid
from finebits.recipe import Recipe
from finebits.run.task import task_of
from finebits.runfolder import TOKENS, RunFolder, digest
from finebits.tasks.base import Prompt, Task

Parts = tuple[Rows, Rows]  # rows to train on, and rows held out


@dataclass(frozen=True)
class Material:
    """The rows of a job as the model sees them. `made_of` is a hash of all that they depend on: what the rows say, the tokenizer with its
    template, and what the recipe says of them."""

    train: Tokens
    held: Tokens
    prompts: tuple[Prompt, ...]
    made_of: str

    def save(self, folder: RunFolder) -> None:
        """Into its file in the folder, unless that holds the same."""
        if not _holds(folder, self.made_of):
            about = {"made_of": self.made_of, "prompts": [asdict(p) for p in self.prompts]}
            arrays.save(folder / TOKENS, {"train": self.train, "held": self.held}, about)

    @classmethod
    def load(cls, folder: RunFolder) -> Material:
        """What `save` wrote. Raises Invalid where it is not there."""
        path = folder / TOKENS
        if not path.exists():
            raise Invalid(f"{folder} holds no {TOKENS}: run finebits train there, which writes it")
        parts, about = arrays.load(path)
        return cls(parts["train"], parts["held"], tuple(Prompt(**p) for p in about["prompts"]), about["made_of"])


def tokenized(recipe: Recipe, rows: Parts) -> Material:
    """The rows of a recipe, tokenized. Raises DataError or TemplateError at the first that cannot be."""
    folder, task, processor = _model(recipe)
    train, held = (task.examples(part, processor, recipe.data.max_length, recipe.data.assistant_only_loss) for part in rows)
    return _of(recipe, rows, folder, task, processor, train, held)


def gated(recipe: Recipe, rows: Parts, saw: Callable[[Check], None] = lambda check: None) -> tuple[Check, Material]:
    """The same through the data gate, with what that saw of the training rows, which `saw` is told before the gate opens or stays shut. Raises
    GateFailed (exit code 4)."""
    from finebits.interop.tokenizer import limits_of

    folder, task, processor = _model(recipe)
    said = processor, recipe.data.max_length, recipe.data.assistant_only_loss, lambda: limits_of(folder, processor)
    found = task.check(rows[0], *said)
    saw(found)
    require(found)
    require(held := task.check(rows[1], *said))
    return found, _of(recipe, rows, folder, task, processor, found.examples, held.examples)


def stored(recipe: Recipe, rows: Parts, folder: RunFolder) -> None:
    """See to it that a folder holds the recipe's rows, tokenized: those that are there are left."""
    if not _holds(folder, _made_of(recipe, rows, _model(recipe)[0])):
        tokenized(recipe, rows).save(folder)


def hash_of(rows: Parts) -> str:
    """What training and held-out rows say, in sixteen hexadecimal digits."""
    return digest(*([r.said for r in part] for part in rows))


def _model(recipe: Recipe) -> tuple[Path, Task, Any]:
    """Its folder, its task, and what makes numbers of rows for it."""
    from finebits.interop.hf import folder_of, processor_of

    folder = folder_of(recipe.model.model_name_or_path, recipe.model.model_revision)
    return folder, task_of(recipe), processor_of(folder)


def _holds(folder: RunFolder, made_of: str) -> bool:
    path = folder / TOKENS
    return path.exists() and arrays.load(path)[1]["made_of"] == made_of


def _made_of(recipe: Recipe, rows: Parts, model: Path) -> str:
    small = [p for p in sorted(model.iterdir()) if p.is_file() and p.suffix in (".json", ".jinja", ".model", ".txt")]
    settings = recipe.data.max_length, recipe.data.assistant_only_loss, recipe.evaluation.samples
    return digest(hash_of(rows), [[p.name, files.sha256(p)] for p in small], settings)


def _of(recipe: Recipe, rows: Parts, model: Path, task: Task, processor: Any, train: Tokens, held: Tokens) -> Material:
    prompts = tuple(task.prompts(rows[1], processor, recipe.evaluation.samples))
    return Material(train, held, prompts, _made_of(recipe, rows, model))
