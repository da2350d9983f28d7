"""Talk to a model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from finebits.cli._recipe import a_folder, a_model
from finebits.cli._screen import Screen

ORDER = 44


def chat(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder or recipe, a model, an export, or a folder of PEFT.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="A folder of PEFT over the model; may be repeated.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the conversation begins with.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the fewest tokens that hold so much.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Talk to a run, before and after tuning, or to any model.

    A line is a turn; /help shows the commands. Answers go to stdout, all else to stderr; stdin may be a pipe. Ctrl-C ends an answer.
    """
    screen: Screen = context.obj
    a_model(model)
    a_folder(*(adapter or ()))
    with screen.working():
        from finebits.run import talking

        talk, hello = talking.talk(model, adapter or [], system, max_new_tokens, temperature, top_p, seed)
    print(hello, file=sys.stderr, flush=True)
    from finebits.process import interrupt, stoppable
    from finebits.run.talking import typed

    for line in typed():
        with stoppable(interrupt):  # each line's own Ctrl-C is its first
            if not talk.said(line):
                break
