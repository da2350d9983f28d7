"""Look at the rows as the trainer will see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finebits.cli._recipe import File, Words, read
from finebits.cli._screen import GREEN, PLAIN, Form, Screen

if TYPE_CHECKING:
    from finebits.recipe import Recipe

ORDER = 20


def check(context: typer.Context, words: Words = None, recipe: File = None) -> None:
    """The gate: exit code 4 if rows must not be trained on."""
    screen: Screen = context.obj
    _gate(screen, read(words, recipe), lambda checked: checked.text(screen.colour))


def preview(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    show: Annotated[int, typer.Option(min=1, help="At most this many of the rows that the check keeps.")] = 3,
) -> None:
    """The first rows, trained tokens marked.

    They are shown after the chat template; what is trained on is green, or in [[ ]] where there is no colour.
    """
    screen: Screen = context.obj

    def human(checked: Any) -> str:
        rows = checked.to_json()["preview"][:show]
        return "\n\n".join(f"line {row['line']}\n" + _painted(row["pieces"], screen.colour).rstrip("\n") for row in rows)

    _gate(screen, read(words, recipe), human)


def _gate(screen: Screen, r: Recipe, human: Callable[[Any], str]) -> None:
    """Check the data and show what was found, also where the gate stays shut: then its exception follows."""
    shut = None
    with screen.working():
        from finebits import job
        from finebits.data.check import GateFailed

        try:
            checked = job.check(r)
        except GateFailed as e:
            checked, shut = e.check, e
    if shut is not None:
        if screen.form in (Form.auto, Form.human):
            print(human(checked))
        raise shut
    screen.show(checked.to_json(), lambda: human(checked), schema="finebits.data/1")


def _painted(pieces: Sequence[tuple[str, bool]], colour: bool) -> str:
    out = []
    for text, trained in pieces:
        text = "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)  # rows must not steer the terminal
        before, after = (GREEN, PLAIN) if colour else ("[[", "]]")
        out.append(f"{before}{text}{after}" if trained else text)
    return "".join(out)
