"""The rows that a recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finebits.data.rows import Rows, joined, read
from finebits.data.split import split
from finebits.errors import Invalid

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
    if not recipe.data.datasets:
        raise Invalid("data.datasets is empty: name at least one file of training rows")
    rows = joined([read(d.path, d.format) for d in recipe.data.datasets])
    if recipe.data.held_out is not None:
        held_out = read(recipe.data.held_out.path, "auto")
    else:
        rows, held_out = split(rows, recipe.data.test_split_size)
    if not len(held_out):
        raise Invalid(f"no row is left to hold out of {len(rows)}: raise data.test_split_size or name data.held_out")
    limit = recipe.evaluation.limit
    return rows, held_out[:limit] if limit else held_out
