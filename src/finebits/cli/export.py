"""Write the tuned model for others; a verdict that fails is the exit code."""

from __future__ import annotations

from typing import Annotated

import typer

from finebits import registry
from finebits.cli._recipe import File, Words, read
from finebits.cli._screen import Screen
from finebits.errors import NoRun

ORDER = 50


def export(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    to: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(registry.names('export'))}, gguf:q4_k_m and the like (one merged file), or several with commas; else the recipe's "
            "export.to.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Read the export with the libraries that it is for, ask llama.cpp or vLLM in an environment that is named (export.runtimes) or "
            "lies here (.venv-llama, .venv-vllm), and compare; else the recipe's.",
        ),
    ] = None,
    requantize: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="For targets that hold codes: one quantized model without an adapter, rounded to this format (int4-b32-bf16) against the tuned "
            "model's outputs; else the recipe's export.requantize.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what else the target's folder holds under the same names.")
    ] = False,
) -> None:
    """Write the tuned model for other tools, and verify it."""
    screen: Screen = context.obj
    said = {"export.to": None if to is None else f"[{to}]", "export.requantize": requantize}
    r = read(words, recipe, [f"{key}={value}" for key, value in said.items() if value is not None])
    if not r.data.datasets:
        raise NoRun.of(words[0] if words else r.output_dir)

    with screen.working():
        from finebits import job

        exported = job.export(r, list(r.export.to), verify, overwrite)
    from finebits.report.results import failed

    if failed(exported):
        screen.code = 6

    def human() -> str:
        from finebits.report.text import export_table

        return export_table(exported, screen.colour)

    screen.show(exported, human, "\n".join(str(target["path"]) for target in exported["targets"]))
    if screen.code:
        raise typer.Exit(screen.code)
