"""How a verb is given its recipe: a file, and values to lay over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from finebits.recipe import Recipe

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE|SECTION.KEY=VALUE", help="A recipe file, then values to lay over it.", show_default=False),
]
File = Annotated[
    Path | None, typer.Option("--recipe", "-r", help="The recipe file, where it is not the first argument.", show_default=False)
]


def read(words: list[str] | None, file: Path | None, more: Sequence[str] = ()) -> Recipe:
    """The recipe that the words of a command name, with what they and `more` lay over it."""
    from finebits.recipe import Recipe

    words = list(words or [])
    if file is None:
        if not words or "=" in words[0]:
            raise typer.BadParameter("name a recipe first, such as recipes/quickstart.yaml")
        file = Path(words.pop(0))
    return Recipe.load(file, [*words, *more])
