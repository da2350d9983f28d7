"""What a job reads before it has a plan: its model's folder, and the rows to train on and held out. Each is read once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finebits import files, registry
from finebits.data.limits import Limits
from finebits.data.rows import DataError, Rows
from finebits.objectives.base import fits
from finebits.recipe import Recipe
from finebits.recipe.rows import rows_of
from finebits.runfolder import digest
from finebits.tasks import base as tasks
from finebits.tasks.base import Task

Parts = tuple[Rows, Rows]  # rows to train on, and rows held out
SIGHT = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "chat_template", "preprocessor")  # how names of files begin


@dataclass(frozen=True)
class Subject:
    """A model's folder, with what it is for and how it sees a row."""

    folder: Path

    @classmethod
    def of(cls, recipe: Recipe, config_only: bool = False) -> Subject:
        """The recipe's, fetched where need be (with `config_only` as far as its task is told by). Raises WrongTask where the recipe names
        another task than its model is made for."""
        from finebits.interop.hf import folder_of

        subject = cls(folder_of(recipe.model.model_name_or_path, recipe.model.model_revision, config_only))
        tasks.agree(recipe.task, subject.config)
        return subject

    @cached_property
    def config(self) -> Any:
        """transformers' config of the model."""
        from finebits.interop.checkpoint import config_of

        return config_of(self.folder)

    @cached_property
    def task(self) -> Task:
        """What the model is for."""
        return tasks.of(self.config)

    @cached_property
    def processor(self) -> Any:
        """What makes numbers of rows for it."""
        from finebits.interop.hf import processor_of

        return processor_of(self.folder)

    def limits(self) -> Limits:
        """What numbers and lengths it can take."""
        from finebits.interop.tokenizer import limits_of

        return limits_of(self.folder, self.processor)

    @cached_property
    def positions(self) -> int | None:
        """Tokens that the model has learned positions for, behind which there are none; None where it counts on."""
        from finebits.interop.tokenizer import seats

        count, fixed = seats(self.folder)
        return count if fixed else None

    @cached_property
    def sight(self) -> list[Any]:
        """Hashes of what decides which numbers a row becomes: files of the tokenizer, its template, the names of labels."""
        named = lambda p: p.name.startswith(SIGHT) or p.suffix in (".jinja", ".model")  # noqa: E731
        sums = [[p.name, files.sha256(p)] for p in sorted(self.folder.iterdir()) if p.is_file() and named(p)]
        return [sums, registry.to_json(self.task)]


@dataclass(frozen=True)
class Source:
    """A recipe with its model and its rows."""

    recipe: Recipe
    model: Subject
    rows: Parts

    @classmethod
    def of(cls, recipe: Recipe) -> Source:
        """Read what a recipe names. Raises DataError at a row that cannot be read, and what `Subject.of` raises."""
        try:
            rows = rows_of(recipe)
        except DataError as e:
            if e.code != 2 or recipe.data.made_by is None:
                raise
            raise DataError(f"{e}; this recipe's rows are made by: {recipe.data.made_by}", code=2) from None
        for part, learned in zip(rows, (True, False), strict=True):
            fits(recipe.objective_value(), part, part.path, learned)
        return cls(recipe, Subject.of(recipe), rows)

    @cached_property
    def hash(self) -> str:
        """What the rows say and how the model sees them, in sixteen hexadecimal digits."""
        return digest(*([r.said for r in part] for part in self.rows), self.model.sight)
