"""The whole way, and the results that it wrote."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from finebits.cli._recipe import File, Words, read, with_rows
from finebits.cli._screen import Screen

ORDER = 30


def train(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    plan: Annotated[Path | None, typer.Option(exists=True, help="A plan to follow instead of making one.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir, from its last whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that output_dir holds; files of others stay.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done (plan, steps, tokens, least time), and stop before anything is trained."),
    ] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps.", show_default=False)] = None,
) -> None:
    """The whole way: plan, gate, quantize, fine-tune, measure, export.

    What stands behind -- are arguments of accelerate launch, which then starts the processes that train: -- --num_processes 2.

    What is done is said in output_dir, where events.jsonl grows while it runs.
    """
    screen: Screen = context.obj
    at = next((i for i, word in enumerate(words or ()) if word.startswith("-")), len(words or ()))
    own, launch = (words or [])[:at], (words or [])[at:]
    r = with_rows(read(own, recipe))

    screen.stopped = lambda: _go_on(r.output_dir)
    with screen.working(long=True):
        from finebits import job

        begun = time.time()
        job.train(r, plan, resume, dry_run, max_steps, overwrite, launch)
    results = _written(Path(r.output_dir), begun)

    def human() -> str:
        from finebits.report import text

        table = lambda evaluation, colour: text.evaluation_table(evaluation, colour, text.columns())  # noqa: E731
        tables = {"memory": text.memory_table, "evaluation": table, "export": text.export_table}
        return "\n\n".join(
            [*(show(results[k], screen.colour).rstrip("\n") for k, show in tables.items() if k in results), f"done: {r.output_dir}"]
        )

    screen.show({"output_dir": r.output_dir} | results, human, r.output_dir)


def _go_on(folder: str) -> str:
    """How a run that was stopped goes on, if it has begun."""
    from finebits.runfolder import RunFolder

    return f"finebits train {shlex.quote(folder)} --resume goes on with it" if RunFolder(folder).holds() else ""


def _written(folder: Path, since: float) -> dict[str, Any]:
    """The results that a run has just written to its folder; the memory is that of the first of its runs."""
    from finebits.runfolder import EVALUATION, EXPORTED, MEMORY, RUNS

    files = {"evaluation": folder / EVALUATION, "export": folder / EXPORTED}
    runs = sorted((folder / RUNS).glob(f"*/{MEMORY}"), key=lambda path: path.stat().st_mtime)
    files |= {"memory": path for path in reversed(runs) if path.stat().st_mtime >= since}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in files.items()
        if path.exists() and path.stat().st_mtime >= since
    }
