"""The page of a run, made again from its folder or its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finebits.cli._recipe import File, read
from finebits.cli._screen import Screen

ORDER = 60


def report(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Argument(help="A run's output_dir, or the recipe that names it.", show_default=False)] = None,
    recipe: File = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the page; FOLDER/report.html if not given.", show_default=False)] = None,
) -> None:
    """Make the HTML page of a run again."""
    screen: Screen = context.obj
    if recipe is not None and folder is not None:
        raise typer.BadParameter("name a folder or --recipe, not both")
    if recipe is None and folder is not None and folder.is_file():
        folder, recipe = None, folder
    if recipe is not None:
        folder = Path(read([], recipe).output_dir)
    elif folder is None:
        raise typer.BadParameter("name the output_dir of a run, or its recipe")

    with screen.working():
        from finebits import job

        page = job.report(folder, out)
    screen.show({"path": str(page)}, lambda: f"wrote {page}", str(page))
