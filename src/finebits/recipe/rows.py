"""The rows that a recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finebits.data.error import DataError
from finebits.data.incomplete import complete
from finebits.data.mixture import mixed
from finebits.data.rows import Rows, joined, read
from finebits.data.split import split
from finebits.errors import WrongUse

if TYPE_CHECKING:
    from finebits.recipe.loading import Recipe


def rows_of(recipe: Recipe) -> tuple[Rows, Rows]:
    """Training and held-out rows. Without a held-out file, some of the training rows are held out.

    >>> import json, tempfile
    >>> from finebits.recipe import Recipe
    >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    ...     json.dump([{"text": word} for word in "abcdefgh"], file, indent=1)
    ...     file.flush()
    ...     train, held = rows_of(Recipe.parse("model: {model_name_or_path: m}", overrides=[f"data.datasets.0.path={file.name}"]))
    >>> len(train), len(held)  # of few rows, a quarter
    (6, 2)
    """
    rows = whole(recipe)
    if (held := recipe.data.held_out) is not None:
        held_out = _kept(recipe, read(held.path, "auto", held.split, held.name, held.data_files))
    else:
        rows, held_out = split(rows, recipe.data.test_split_size)
    if not len(held_out):
        many = "row" if len(rows) == 1 else "rows"
        raise DataError(f"of {len(rows)} {many} none is left to hold out: raise data.test_split_size, add rows, or name data.held_out")
    limit = recipe.evaluation.limit
    return rows, held_out[:limit] if limit else held_out


def named(recipe: Recipe) -> None:
    """Raises WrongUse where a recipe names no rows to train on.

    >>> from finebits.recipe import Recipe
    >>> named(Recipe.parse("model: {model_name_or_path: m}"))
    Traceback (most recent call last):
        ...
    finebits.errors.WrongUse: data.datasets is empty: name rows to train on behind the model (MODEL rows.jsonl), or in the recipe
    """
    if not recipe.data.datasets:
        raise WrongUse("data.datasets is empty: name rows to train on behind the model (MODEL rows.jsonl), or in the recipe")


def whole(recipe: Recipe) -> Rows:
    """All rows of data.datasets, mixed as they say, before any are held out.

    >>> import json, tempfile
    >>> from finebits.recipe import Recipe
    >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    ...     json.dump([{"text": word} for word in "abcdefgh"], file)
    ...     file.flush()
    ...     words = [f"data.datasets.0.path={file.name}", "data.datasets.0.fraction=0.5"]
    ...     len(whole(Recipe.parse("model: {model_name_or_path: m}", overrides=words)))
    4
    """
    named(recipe)
    sets = recipe.data.datasets
    parts = [_kept(recipe, read(d.path, d.format, d.split, d.name, d.data_files, d.revision)) for d in sets]
    return joined(mixed(parts, [d.fraction for d in sets], [d.weight for d in sets], recipe.training.seed))


def _kept(recipe: Recipe, rows: Rows) -> Rows:
    return complete(rows) if recipe.data.drop_incomplete else rows
