"""A smaller model to train in the place of a large one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finebits import registry
from finebits.cli._recipe import a_model, some_rows
from finebits.cli._screen import Screen

ORDER = 52
HALF = "Of every block's feed-forward channels and heads."


def prune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, hub id, .gguf file or package:NAME.")],
    out: Annotated[Path, typer.Option(help="The folder that the pruned model is written to.")],
    keep: Annotated[float | None, typer.Option(help=f"The share that stays: {HALF} Half, if nothing is said.", show_default=False)] = None,
    channels: Annotated[str | None, typer.Option(help="The share of channels alone, or how many.", show_default=False)] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="The share of heads of keys and values alone (their queries go with them), or how many.", show_default=False),
    ] = None,
    blocks: Annotated[str | None, typer.Option(help="The share of blocks that stay, or how many; else all.", show_default=False)] = None,
    drop: Annotated[str | None, typer.Option(metavar="N,N", help="Blocks that go, counted from 0.", show_default=False)] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="N:M|SHARE", help="Entries that stay of every M, or of every row; others are 0. Saves no memory.", show_default=False
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help=f"What is worth most: {', '.join(registry.names('pruners'))}; else wanda with rows, magnitude without.", show_default=False
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Rows that the model is run on, to see what is worth most.", show_default=False)] = None,
    rows: Annotated[int, typer.Option(min=1, help="So many of them.")] = 128,
    like: Annotated[str | None, typer.Option(help="A pruned model: keep what it has kept.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Of the model on the hub.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that the folder holds.")] = False,
) -> None:
    """Write a part of a model, to train it in little memory.

    It is a stock checkpoint: name its folder in a recipe and train. What was trained, finebits recover makes an adapter of the whole model.
    """
    screen: Screen = context.obj
    try:
        dropped = [int(n) for n in drop.split(",")] if drop else []
    except ValueError:
        raise typer.BadParameter(f"--drop takes numbers of blocks with commas, such as 5,6, and {drop!r} came") from None
    a_model(model, like)
    some_rows(data)
    pruner = None if by is None else registry.load("pruners", by)()
    with screen.working():
        from finebits.interop.pruning import prune as write
        from finebits.progress import Progress

        made = write(
            model,
            out,
            keep,
            channels=_number("channels", channels),
            heads=_number("heads", heads),
            blocks=_number("blocks", blocks) or 1.0,
            drop=dropped,
            mask=mask,
            by=pruner,
            data=data,
            like=like,
            seed=seed,
            calibration_rows=rows,
            revision=revision,
            overwrite=overwrite,
            progress=Progress("pruning"),
        )
    counts = {kind: made.kept.count(kind) for kind in made.kept.units}
    shown = {"path": str(out), "model": made.model, "base": made.base, "pruned": made.pruned, "blocks": len(made.kept.blocks), **counts}
    shown |= {"mask": made.mask, "parameters": list(made.parameters)}

    def human() -> str:
        before, after = made.parameters
        kept = [
            f"{len(made.kept.blocks)} blocks",
            *(f"{n} {'heads of keys and values' if k == 'heads' else k} a block" for k, n in counts.items()),
        ]
        zeros = f"; mask {made.mask}: the other entries are 0 and take the same room" if made.mask else ""
        return f"{out}: {after:,} of {before:,} parameters ({after / before:.0%}), {', '.join(kept)}{zeros}"

    screen.show(shown, human, str(out))


def _number(option: str, text: str | None) -> float | int | None:
    try:
        return None if text is None else int(text) if text.isdigit() and int(text) > 1 else float(text)
    except ValueError:
        raise typer.BadParameter(f"--{option} takes a share such as 0.6, or a number, and {text!r} came") from None
