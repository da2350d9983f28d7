"""The page of a run, made again from its folder or its recipe; or one page of several runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from finebits.cli._recipe import File, read
from finebits.cli._screen import Screen
from finebits.errors import NoRun

ORDER = 60


def report(
    context: typer.Context,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FOLDER", help="A run's output_dir, or the recipe that names it; with --compare several.", show_default=False
        ),
    ] = None,
    recipe: File = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the page; FOLDER/report.html if not given, or comparison.html where all runs are.", show_default=False
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="One page that lays several runs over one another.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Serve the page, on this machine alone, and follow the run while it is going.")
    ] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of --live.")] = 8766,
) -> None:
    """The page of a run, of several, or of one that is going.

    report RUN makes it again, report --compare A B C lays runs over each other, report RUN --live follows a run.
    """
    screen: Screen = context.obj
    named = list(folders or [])
    if recipe is not None and named and not compare:
        raise typer.BadParameter("name a folder or --recipe, not both")
    named += [recipe] if recipe is not None else []
    if not named:
        raise typer.BadParameter("name the output_dir of a run, or its recipe")
    if len(named) > 1 and not compare:
        raise typer.BadParameter(f"{len(named)} runs came: --compare makes one page of them")
    if live and (compare or out is not None):
        raise typer.BadParameter("--live serves the page of one run and writes none: leave --compare and --out out")
    places = [Path(read([], path).output_dir) if path.is_file() or path == recipe else path for path in named]

    if away := next((place for place in places if not place.is_dir()), None):
        raise NoRun.of(away)

    if live:
        with screen.working():
            from finebits.report import summary
            from finebits.serve import following

            summary.opened(places[0])
            app = following.app(places[0])
        print(f"http://127.0.0.1:{port}   Ctrl-C ends it", file=sys.stderr)
        return following.follow(app, port)
    with screen.working():
        from finebits import job

        page = job.compare(places, out) if compare else job.report(places[0], out)
    screen.show({"path": str(page)}, lambda: f"wrote {page}", str(page))
