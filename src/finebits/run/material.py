"""What a job learns from and is scored on. Files are parsed and rows tokenized once, by the gate; the planner is handed the arrays, and every
process of the job reads them from the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finebits import files, registry
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
SIGHT = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "chat_template", "preprocessor")  # how names of files begin


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
    task, processor = _sight(recipe)
    train, held = (task.examples(part, processor, recipe.data.max_length, recipe.data.assistant_only_loss) for part in rows)
    return _of(recipe, rows, task, processor, train, held)


def gated(recipe: Recipe, rows: Parts, saw: Callable[[Check], None] = lambda check: None) -> tuple[Check, Material]:
    """The same through the data gate, with what that saw of the training rows, which `saw` is told before the gate opens or stays shut. Raises
    GateFailed (exit code 4)."""
    from finebits.interop.tokenizer import limits_of

    task, processor = _sight(recipe)
    said = processor, recipe.data.max_length, recipe.data.assistant_only_loss, lambda: limits_of(_folder(recipe), processor)
    found = task.check(rows[0], *said)
    saw(found)
    require(found)
    require(held := task.check(rows[1], *said))
    return found, _of(recipe, rows, task, processor, found.examples, held.examples)


def stored(recipe: Recipe, rows: Parts, folder: RunFolder) -> None:
    """See to it that a folder holds the recipe's rows, tokenized: those that are there are left."""
    if not _holds(folder, _made_of(recipe, rows)):
        tokenized(recipe, rows).save(folder)


def hash_of(recipe: Recipe, rows: Parts) -> str:
    """What training and held-out rows say, and what makes numbers of them (a tokenizer's files, its template, the names of labels), in sixteen
    hexadecimal digits."""
    named = lambda p: p.name.startswith(SIGHT) or p.suffix in (".jinja", ".model")  # noqa: E731
    made_by = [[p.name, files.sha256(p)] for p in sorted(_folder(recipe).iterdir()) if p.is_file() and named(p)]
    return digest(*([r.said for r in part] for part in rows), made_by, registry.to_json(task_of(recipe)))


def _folder(recipe: Recipe) -> Path:
    from finebits.interop.hf import folder_of

    return folder_of(recipe.model.model_name_or_path, recipe.model.model_revision)


def _sight(recipe: Recipe) -> tuple[Task, Any]:
    """The task of a recipe's model, and what makes numbers of rows for it."""
    from finebits.interop.hf import processor_of

    return task_of(recipe), processor_of(_folder(recipe))


def _holds(folder: RunFolder, made_of: str) -> bool:
    path = folder / TOKENS
    return path.exists() and arrays.load(path)[1]["made_of"] == made_of


def _made_of(recipe: Recipe, rows: Parts) -> str:
    return digest(hash_of(recipe, rows), recipe.data.max_length, recipe.data.assistant_only_loss, recipe.evaluation.samples)


def _of(recipe: Recipe, rows: Parts, task: Task, processor: Any, train: Tokens, held: Tokens) -> Material:
    prompts = tuple(task.prompts(rows[1], processor, recipe.evaluation.samples))
    return Material(train, held, prompts, _made_of(recipe, rows))
