"""Look at a recipe."""

from __future__ import annotations

import json

import typer

from finebits.cli._recipe import File, Words, read

ORDER = 90


def schema() -> None:
    """The JSON Schema, for completion in editors."""
    from finebits.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def show(context: typer.Context, words: Words = None, recipe: File = None) -> None:
    """Every key with its value, defaults and overrides included."""
    r = read(words, recipe)
    context.obj.show(r.model_dump(), lambda: r.to_yaml().rstrip(), r.to_yaml().rstrip())


def validate(context: typer.Context, words: Words = None, recipe: File = None) -> None:
    """Every mistake at its line, and exit code 2; or ok."""
    r = read(words, recipe)
    context.obj.show({"valid": True, "output_dir": r.output_dir}, lambda: "ok")
