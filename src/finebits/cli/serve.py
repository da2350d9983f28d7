"""A page of a plan that solves it again, on this machine alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

ORDER = 70


def serve(
    what: Annotated[Path, typer.Argument(metavar="PLAN|FOLDER", help="A plan.json, or the output_dir that holds one.")],
    studio: Annotated[
        bool, typer.Option("--studio", help="The page of the plan, with a slider for the budget that solves it again.")
    ] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On this machine alone.")] = 8765,
) -> None:
    """A local page of a plan: move the budget and see the bits."""
    if not studio:
        raise typer.BadParameter("finebits serves the page of a plan and no models: add --studio")
    from finebits.serve import studio as server

    server.plan_at(what)  # what cannot be read fails before anything listens
    print(f"http://127.0.0.1:{port}   Ctrl-C ends it", file=sys.stderr)
    server.studio(what, port)
