"""Answer prompts: one, or a file of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from finebits.cli._recipe import a_folder, a_model
from finebits.cli._screen import Screen

ORDER = 42


def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder or recipe, a model, an export, or a folder of PEFT.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE|PROMPT", help="Prompts (.jsonl, .json, or .txt, one a line), or one in words; else stdin.", show_default=False
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where answers to a file go; those that are there are kept.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="A folder of PEFT over the model.", show_default=False)
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="What a conversation begins with, where it has no system message.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the fewest tokens that hold so much.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 4,
) -> None:
    """Answer prompts with a model, in its own chat template.

    An interrupted file goes on where it stopped, and ends as one that was not interrupted.
    """
    screen: Screen = context.obj
    words = list(words or [])
    alone = words[0] if len(words) == 1 else ""
    there = os.path.isfile(alone)
    named = alone.lower().endswith((".jsonl", ".json", ".txt")) and (there or out is not None or not set(alone) & set(" \n"))
    file = Path(alone) if named else None
    if named and not there:
        raise typer.BadParameter(f"there is no file {alone}")
    if file is None and there and Path(alone).suffix:
        raise typer.BadParameter(
            f"prompts are read from .jsonl, .json and .txt files, and {alone} is none: finebits data convert makes one"
        )
    if (file is None) != (out is None):
        raise typer.BadParameter("--out FILE takes the answers to a file of prompts: name both, or neither")
    if file is None and not words:
        if sys.stdin.isatty():
            raise typer.BadParameter("name a prompt, a file of prompts, or give one on stdin")
        words = [sys.stdin.read().strip()]
        if not words[0]:
            raise typer.BadParameter("stdin was empty: give a prompt")

    a_model(model)
    a_folder(*(adapter or ()))
    if out is not None:
        screen.stopped = lambda: "the same command goes on where it stopped"
    with screen.working():
        from finebits.run import answering

        said = answering.generate(
            model, file or " ".join(words), out, adapter or [], system, max_new_tokens, temperature, top_p, seed, batch
        )

    def human() -> str:
        if out is None:
            return said["answer"]
        speed = f", {said['tokens_per_second']:.1f} tokens/s" if said["tokens_per_second"] else ""
        return f"{said['path']}: {said['rows']} answers, {said['kept']} of them from before{speed}"

    screen.show(said, human, said["answer"] if out is None else str(out))
