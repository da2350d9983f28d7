"""What was trained on a pruned model, for the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finebits.cli._recipe import a_model
from finebits.cli._screen import Screen

ORDER = 54


def recover(
    context: typer.Context,
    tuned: Annotated[Path, typer.Argument(exists=True, help="The output_dir of a run on a pruned model, or a folder of PEFT.")],
    out: Annotated[Path, typer.Option(help="The folder that the adapter of the whole model is written to.")],
    pruned: Annotated[str | None, typer.Option(help="The pruned model, where it is not where it was.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="The whole model, where it is not where it was.", show_default=False)] = None,
    score: Annotated[bool, typer.Option("--score/--no-score", help="Score it on the run's held-out rows over the whole model.")] = True,
    quantize: Annotated[
        list[str] | None,
        typer.Option(metavar="FORMAT", help="Score it over the whole model in such a format, too: nf4-b64.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter that the folder holds.")] = False,
) -> None:
    """Make an adapter of the whole model of one of a pruned model.

    It is a plain LoRA in PEFT's form.
    """
    screen: Screen = context.obj
    a_model(pruned, model)
    with screen.working(long=True):
        from finebits import job

        made = job.recover(tuned, out, pruned, model, score, quantize or [], overwrite)

    def human() -> str:
        wide = max((len(row["model"]) for row in made["losses"]), default=0)
        rows = [f"{r['model']:{wide}}  {'with' if r['adapter'] else 'without':7} the adapter  loss {r['loss']:.4f}" for r in made["losses"]]
        return "\n".join([*rows, f"wrote {out}, a LoRA of {made['model']}"])

    screen.show(made, human, str(out))
