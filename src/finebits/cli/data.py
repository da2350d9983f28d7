"""Look at rows as the trainer sees them; convert and split them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finebits.cli._recipe import File, a_model, is_recipe, read, some_rows
from finebits.cli._screen import GREEN, PLAIN, Form, Screen

if TYPE_CHECKING:
    from finebits.recipe import Recipe

ORDER = 20

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE|ROWS...|SECTION.KEY=VALUE",
        help="A recipe file, or files, folders, patterns or hub ids of rows; then values to lay over it.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="The model whose tokenizer reads the rows, where there is no recipe.", show_default=False),
]
Length = Annotated[int | None, typer.Option("--max-length", min=2, help="Tokens of a row; longer ones are cut.", show_default=False)]
Drop = Annotated[bool, typer.Option("--drop-incomplete", help="Leave out conversations that end without an answer, or hold none.")]
Over = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]


def check(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    model: Model = None,
    max_length: Length = None,
    drop_incomplete: Drop = False,
) -> None:
    """The gate: exit code 4 if rows must not be trained on."""
    screen: Screen = context.obj
    _gate(screen, *_asked(words, recipe, model, max_length, drop_incomplete), lambda checked: checked.text(screen.colour))


def preview(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    model: Model = None,
    max_length: Length = None,
    drop_incomplete: Drop = False,
    show: Annotated[int, typer.Option(min=1, max=8, help="How many of the first rows.")] = 3,
) -> None:
    """The first rows, trained tokens marked.

    They are shown after the chat template; what is trained on is green, or in [[ ]] where there is no colour.
    """
    screen: Screen = context.obj

    def human(checked: Any) -> str:
        rows = checked.to_json()["preview"][:show]
        return "\n\n".join(f"line {row['line']}\n" + _painted(row["pieces"], screen.colour).rstrip("\n") for row in rows)

    _gate(screen, *_asked(words, recipe, model, max_length, drop_incomplete), human)


def stats(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    model: Model = None,
    max_length: Length = None,
    drop_incomplete: Drop = False,
) -> None:
    """Lengths, what is trained, what cutting at several lengths and packing would do, rows that say the same."""
    screen: Screen = context.obj
    r, _ = _asked(words, recipe, model, max_length, drop_incomplete)
    with screen.working():
        from finebits import job
        from finebits.data.stats import SCHEMA, text

        held = job.stats(r)
    screen.show(held, lambda: text(held), schema=SCHEMA)


def convert(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    to: Annotated[str, typer.Option("--to", help="messages, or prompt_completion: a row for every answer that is learned.")] = "messages",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The .jsonl file to write.", show_default=False)] = None,
    drop_incomplete: Drop = False,
    overwrite: Over = False,
) -> None:
    """Write rows of any form as messages, or as prompt and completion; of pairs the better answers, of judged ones those that are wanted."""
    screen: Screen = context.obj
    if out is None:
        raise typer.BadParameter("name the file to write: --out rows.jsonl")
    r, _ = _asked(words, recipe, None, None, drop_incomplete, reads=False)
    with screen.working():
        from finebits import job

        done = job.convert(r, to, out, overwrite)
    what = "" if done["wrote"] == done["read"] else f" ({done['wrote']:,} answers)"
    screen.show(
        done, lambda: f"{done['why']}\nwrote {done['read']:,} rows{what} as {to} to {done['path']}", str(out), "finebits.data_convert/1"
    )


def split(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    share: Annotated[
        float | None, typer.Option(help="The share to hold out; else 2%, but at least 20 rows, or a quarter of few.", show_default=False)
    ] = None,
    out_dir: Annotated[Path | None, typer.Option(help="The folder to write to; else that of the rows.", show_default=False)] = None,
    overwrite: Over = False,
) -> None:
    """Write rows in two files, to train on and to hold out; rows that say the same stay together. training.seed draws them."""
    screen: Screen = context.obj
    if share is not None and not 0 < share < 1:
        raise typer.BadParameter(f"--share is {share:g}: it can be above 0 and below 1")
    r, _ = _asked(words, recipe, None, None, False, reads=False)
    with screen.working():
        from finebits import job

        done = job.split(r, share, out_dir, overwrite)
    lines = [f"wrote {done[part]['rows']:,} rows to {done[part]['path']}" for part in ("train", "held_out")]
    lines += [
        "Next: in a recipe",
        f"  data: {{datasets: [{{path: {done['train']['path']}}}], held_out: {{path: {done['held_out']['path']}}}}}",
    ]
    screen.show(done, lambda: "\n".join(lines), done["train"]["path"], "finebits.data_split/1")


def _asked(
    words: list[str] | None, file: Path | None, model: str | None, max_length: int | None, drop: bool, reads: bool = True
) -> tuple[Recipe, bool]:
    """(the recipe, whether it is one that was made of rows and a model here)."""
    words = list(words or [])
    more = [*([f"data.max_length={max_length}"] if max_length else []), *(["data.drop_incomplete=true"] if drop else [])]
    if file is not None or not words or "=" in words[0] or is_recipe(words[0]):
        more += [f"model.model_name_or_path={model}"] if model else []
        return read(words, file, more), False
    places = [w for w in words if "=" not in w]
    a_model(model)
    some_rows(*places)
    if model is None and reads:
        raise typer.BadParameter(f"name the model that {places[0]} is for: --model MODEL; or give a recipe (.yaml) in its place")
    from finebits.recipe import Recipe

    more = [w for w in words if "=" in w] + more
    text = json.dumps({"model": {"model_name_or_path": model or "none"}, "data": {"datasets": [{"path": p} for p in places]}})
    return Recipe.parse(text, "the command", more), True


def _gate(screen: Screen, r: Recipe, alone: bool, human: Callable[[Any], str]) -> None:
    """Check the data and show what was found, also where the gate stays shut: then its exception follows."""
    shut = None
    with screen.working():
        from finebits import job
        from finebits.data.check import GateFailed

        try:
            checked = job.check_rows(r) if alone else job.check(r)
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
