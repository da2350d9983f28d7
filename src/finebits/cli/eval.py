"""Score the tuned model again."""

from __future__ import annotations

from pathlib import Path

import typer

from finebits.cli._recipe import File, Words, read
from finebits.cli._screen import Screen

ORDER = 40


def evaluate(context: typer.Context, words: Words = None, recipe: File = None) -> None:
    """Loss, perplexity, KL and agreement on the held-out rows."""
    screen: Screen = context.obj
    r = read(words, recipe)
    from finebits.runfolder import EVALUATION

    with screen.working():
        from finebits import job

        evaluation = job.evaluate(r)

    def human() -> str:
        from finebits.report.text import columns, evaluation_table

        return evaluation_table(evaluation, screen.colour, columns())

    screen.show(evaluation, human, str(Path(r.output_dir) / EVALUATION), "finebits.evaluation/1")
