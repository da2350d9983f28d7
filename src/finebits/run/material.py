"""What a job learns from and is scored on. Files are parsed and rows tokenized once, by the gate; the planner is handed the arrays, and every
process of the job reads them from the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from finebits.data import arrays
from finebits.data.arrays import Tokens
from finebits.data.check import Check, require
from finebits.data.duplicates import shared
from finebits.data.packing import Packs
from finebits.errors import Invalid
from finebits.recipe.keys.data import Data
from finebits.run.source import Source
from finebits.runfolder import TOKENS, RunFolder, digest
from finebits.tasks.base import Prompt, Task


@dataclass(frozen=True)
class Material:
    """The rows of a job as the model sees them. `made_of` is a hash of all that they depend on: what the rows say, the tokenizer with its
    template, and what the recipe says of them."""

    train: Tokens
    held: Tokens
    prompts: tuple[Prompt, ...]
    made_of: str

    def batches(self, task: Task, processor: Any, size: int, multiple: int) -> list[dict[str, Any]]:
        """The held-out rows; those of like length share a batch. Scores are per row, in this order everywhere."""
        return batched(self.held, task, processor, size, multiple)

    def units(self, data: Data) -> Tokens | Packs:
        """What a step takes several of: rows, or packs of them where the recipe's `data` says so."""
        return Packs.of(self.train, data.max_length) if data.packing else self.train

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


def batched(examples: Tokens, task: Task, processor: Any, size: int, multiple: int = 1) -> list[dict[str, Any]]:
    """Batches of rows of like length, the longest first."""
    rows = [vars(e) for e in sorted(examples, key=lambda e: -len(e.input_ids))]
    return [task.batch(rows[i : i + size], processor, multiple) for i in range(0, len(rows), size)]


def tokenized(source: Source) -> Material:
    """The rows of a recipe, tokenized. Raises DataError or TemplateError at the first that cannot be."""
    model, data = source.model, source.recipe.data
    train, held = (model.task.examples(part, model.processor, data.max_length, data.assistant_only_loss) for part in source.rows)
    return _of(source, train, held)


def gated(source: Source, saw: Callable[[Check], None] = lambda check: None) -> tuple[Check, Material]:
    """The same through the data gate, with what that saw of the training rows, which `saw` is told before the gate opens or stays shut. Raises
    GateFailed (exit code 4)."""
    model, data = source.model, source.recipe.data
    settings = model.processor, data.max_length, data.assistant_only_loss, model.limits
    train = model.task.check(source.rows[0], *settings)
    if (again := shared(*source.rows)) is not None:
        train = replace(train, problems=(*train.problems, again))
    if data.packing and len(train.examples):
        packs = Packs.of(train.examples, data.max_length)
        train = replace(train, packed=(len(packs), packs.filled))
    saw(train)
    require(train)
    held = model.task.check(source.rows[1], *settings)
    require(held)
    return train, _of(source, train.examples, held.examples)


def stored(source: Source, folder: RunFolder) -> None:
    """See to it that a folder holds the recipe's rows, tokenized: those that are there are left."""
    if not _holds(folder, _made_of(source)):
        tokenized(source).save(folder)


def _holds(folder: RunFolder, made_of: str) -> bool:
    path = folder / TOKENS
    return path.exists() and arrays.load(path)[1]["made_of"] == made_of


def _made_of(source: Source) -> str:
    data = source.recipe.data
    return digest(source.hash, data.max_length, data.assistant_only_loss, source.recipe.evaluation.samples)


def _of(source: Source, train: Tokens, held: Tokens) -> Material:
    model, count, longest = source.model, source.recipe.evaluation.samples, source.recipe.data.max_length
    if model.positions is not None:  # of which an answer takes one at the least, and virtual tokens theirs
        longest = min(longest, model.positions - 1 - getattr(source.recipe.adapter_value(), "tokens", 0))
    prompts = model.task.prompts(source.rows[1], model.processor, count, longest)
    return Material(train, held, tuple(prompts), _made_of(source))
