"""Write a recipe to begin with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from finebits.cli._recipe import Words, folder_for, named
from finebits.cli._screen import Screen

ORDER = 5


def init(
    context: typer.Context,
    words: Words = None,
    template: Annotated[
        str | None, typer.Option(metavar="KIND", help="sft, preference, text or classification; sft if not given.", show_default=False)
    ] = None,
    of: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            "--from",
            metavar="TOOL FILE",
            help="Import a config of axolotl, llamafactory, trl, unsloth, torchtune or mlx; what has no key here is listed.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write it; a file that is there is left alone.")] = Path("recipe.yaml"),
) -> None:
    """Write a recipe with comments.

    It comes from a template, from questions, or from another tool's config.

    finebits init MODEL rows.jsonl --budget 8GiB, or without words on a terminal, which asks. Nothing is asked where no terminal reads.
    """
    screen: Screen = context.obj
    if out.exists():
        raise typer.BadParameter(f"{out} is there already and is not overwritten: name another file with --out")
    if of is not None and template is not None:
        raise typer.BadParameter("--from takes the settings of another tool and --template has its own: leave one of the two out")
    names = [word for word in words or [] if "=" not in word or os.path.exists(word)]
    changes = [*named(names), *(word for word in words or [] if word not in names)]

    left: dict[str, str] = {}
    if of is not None:
        from finebits.importers.base import imported

        text, left = imported(*of, changes)
    else:
        from finebits.recipe import templates
        from finebits.recipe.mistakes import nearest

        if template is None and not words and sys.stdin.isatty():
            template, changes = _asked(templates.kinds())
        template = template or "sft"
        if template not in templates.kinds():
            meant = nearest(template, templates.kinds())
            hint = f": did you mean {meant}?" if meant else ""
            raise typer.BadParameter(f"--template wants {', '.join(templates.kinds())}, and {template!r} came{hint}")
        text = templates.template(template, [f"output_dir={json.dumps(folder_for(changes))}", *changes])
    from finebits.files import write_text

    write_text(out, text)
    for key, why in left.items():
        print(f"!  {key} is not in the recipe: {why}", file=sys.stderr)
    note = f"{len(left)} keys are not in it, and listed at its end\n" if left else ""
    screen.show({"path": str(out), "left": left}, lambda: f"wrote {out}\n{note}Next: finebits plan {out}", str(out))


def _asked(kinds: tuple[str, ...]) -> tuple[str, list[str]]:
    """A template and values, from a person at a terminal; questions go to stderr."""

    def ask(text: str, default: str | None = None) -> str:
        return str(typer.prompt(text, default=default, err=True)).strip()

    kind = ask(f"What for ({', '.join(kinds)})", "sft")
    model = ask("Model (a folder, a hub id, a .gguf file)")
    rows = ask("Rows (a file, a folder, a hub id)")
    memory = ask("Memory that the job may take", "8GiB")
    return kind, [*named([model, rows]), f"budget.memory={json.dumps(memory)}"]
