"""Looking at rows without a run: through the gate, in figures, in another form, in two parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finebits.data.check import Check, require
from finebits.data.convert import converted
from finebits.data.duplicates import shared
from finebits.data.error import DataError
from finebits.data.parted import parted
from finebits.data.reading import found
from finebits.data.rows import Rows
from finebits.data.stats import stats
from finebits.errors import Invalid
from finebits.files import Occupied, replaced
from finebits.recipe import Recipe
from finebits.recipe.rows import whole
from finebits.run.source import Subject

UNCUT = 1 << 30  # tokens


def checked(recipe: Recipe) -> Check:
    """The gate over all rows of data.datasets, where no run is meant: none is held out, nothing is written. Raises GateFailed."""
    check = _check(recipe, whole(recipe), recipe.data.max_length)
    require(check)
    return check


def figures(recipe: Recipe) -> dict[str, Any]:
    """Figures of the training rows (finebits.data.stats), and how many held-out rows are among them where there is a file of these."""
    from finebits.recipe.rows import rows_of

    rows = whole(recipe)
    check = _check(recipe, rows, UNCUT)
    held = stats(rows, check.examples, recipe.data.max_length)
    held["unread"] = len(rows) - len(check.lengths)
    if recipe.data.held_out is not None:
        again = shared(*rows_of(recipe))
        held["held_out_overlap"] = 0 if again is None else len(again.lines)
    return held


def _check(recipe: Recipe, rows: Rows, max_length: int) -> Check:
    model = Subject.of(recipe)
    return model.task.check(rows, model.processor, max_length, recipe.data.assistant_only_loss, model.limits)


def convert(recipe: Recipe, to: str, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """All rows of data.datasets in another form (finebits.data.convert), in one .jsonl file."""
    _free([out], overwrite)
    rows = whole(recipe)
    wrote = _written(out, converted(rows, to))
    if not wrote:
        out.unlink()
        raise DataError(f"{rows.path} holds no row that is wanted: nothing is left to write")
    return {"path": str(out), "from": rows.format, "to": to, "why": rows.why, "read": len(rows), "wrote": wrote}


def split(recipe: Recipe, share: float | None, folder: Path | None, overwrite: bool = False) -> dict[str, Any]:
    """The records of data.datasets, as they are, in two .jsonl files: NAME.train.jsonl and NAME.held_out.jsonl, beside the first file where no
    folder is named."""
    sets = recipe.data.datasets
    if any(d.fraction is not None or d.weight is not None for d in sets):
        raise Invalid("data.datasets mixes by fraction or weight, and a split takes all records: name the files themselves")
    whole(recipe)  # which raises where the rows cannot be read
    records = [r for d in sets for file in found(d.path, d.split, d.name, d.data_files, d.revision)[0] for _, r in file.records]
    train, held = parted(records, share, recipe.training.seed)
    first = Path(sets[0].path)
    folder = folder or (first.parent if first.exists() else Path("."))
    name = "rows" if len(sets) > 1 or not first.exists() or first.resolve() == Path(".").resolve() else first.name.partition(".")[0]
    outs = [folder / f"{name}.{part}.jsonl" for part in ("train", "held_out")]
    _free(outs, overwrite)
    wrote = [_written(out, part) for out, part in zip(outs, (train, held), strict=True)]
    return {
        "train": {"path": str(outs[0]), "rows": wrote[0]},
        "held_out": {"path": str(outs[1]), "rows": wrote[1]},
        "seed": recipe.training.seed,
    }


def _free(outs: Sequence[Path], overwrite: bool) -> None:
    for out in outs:
        if out.is_dir():
            raise Occupied(f"{out} is a folder: name a file")
        if out.exists() and not overwrite:
            raise Occupied(f"{out} is there already: name another, or replace it with --overwrite")


def _written(out: Path, records: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with replaced(out) as new, new.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count
