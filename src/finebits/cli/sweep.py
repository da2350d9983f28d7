"""A recipe over several values of some of its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finebits.cli._recipe import File, a_recipe, read, with_rows
from finebits.cli._screen import Screen

ORDER = 35


def sweep(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|MODEL DATA|SECTION.KEY=VALUE,VALUE",
            help="A recipe file, or a model and its rows; then keys with their values.",
            show_default=False,
        ),
    ] = None,
    recipe: File = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Train at most this many cells now.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train finished cells again, in place of what they hold.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, and train none.")] = False,
) -> None:
    """Train a recipe over a grid of values, into one table.

    training.learning_rate=1e-4,3e-4 adapter.rank=8,16 are four cells, each in output_dir/sweep/CELL. The same command goes on after a stop:
    finished cells are kept. A cell that fails is a row of the table, and exit code 1.
    """
    screen: Screen = context.obj
    given = list(words or [])
    names = [word for word in given if "=" not in word or Path(word).exists()]
    if recipe is None and not names:
        raise typer.BadParameter("name a recipe first, such as recipes/quickstart.yaml, or a model and its rows")
    a_recipe(recipe, *names[:1])
    from finebits.run import grid

    cells, rest = grid.cells([word for word in given if word not in names])
    load = lambda more: with_rows(read(names, recipe, [*rest, *more]))  # noqa: E731
    base = load([])
    if dry_run:
        made = grid.table(grid.recipes(base, cells, load), cells, {})
    else:
        screen.stopped = lambda: "the same command goes on: finished cells are kept"
        with screen.working(long=True):
            from finebits import job

            made = job.sweep(base, cells, load, limit, overwrite)
    screen.code = 1 if any(row["status"] == "failed" for row in made["cells"]) else 0
    place = Path(base.output_dir) / grid.FOLDER
    screen.show(made, lambda: _table(made, screen.colour), str(place / grid.RECORD), grid.SCHEMA)
    if screen.code:
        raise typer.Exit(screen.code)


def _table(made: dict[str, Any], colour: bool) -> str:
    """The cells, best first; those that came to nothing last, with their words."""
    from finebits.report.cells import ABSENT, Column, Table, columns, difference, number, size, span
    from finebits.report.summary import took

    keys = list(made["cells"][0]["values"])
    worst = float("inf")
    rows, notes = [], []
    ends = lambda after: (after.get("loss"), after.get("low"), after.get("high"))  # noqa: E731
    for row in sorted(made["cells"], key=lambda row: worst if (row.get("after") or {}).get("loss") is None else row["after"]["loss"]):
        middle, low, high = row.get("paired") or (None, None, None)
        reading = "best" if row["cell"] == made["best"] else ABSENT
        if middle is not None and reading != "best":
            reading = "too few rows" if low is None else "worse" if low > 0 else "undecided"
        loss, peak = ends(row.get("after") or {}), (row.get("memory") or {}).get("measured")
        pair = (middle, low, high)
        rows.append((*row["values"].values(), loss, pair, reading, row.get("seconds"), peak, row["status"]))
        notes += [f" {row['cell']}: {row['said']}"] if row.get("said") else []
    loss = Column("held-out loss", span(lambda v: number(v, 3)), ("loss", "loss low", "loss high"))
    heads = [*(Column(key.rpartition(".")[2]) for key in keys), loss, Column("against the best", span(difference)), Column("reading")]
    heads += [Column("took", took), Column("peak", size), Column("status")]
    best = frozenset(i for i, row in enumerate(rows) if "best" in row)
    return "\n".join([Table("sweep", tuple(heads), rows, best).text(colour, columns(180)).rstrip("\n"), *notes])
