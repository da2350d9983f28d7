"""Every `finebits VERB --option` that README and docs show is one that there is."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import typer.main

import doc_pages as pages
from finebits.cli import _command
from finebits.cli._screen import Screen


@functools.cache
def command() -> Any:
    return typer.main.get_command(_command.application())


def parsed(words: list[str]) -> str:
    """The command that words name, all of them read as the command line reads them, and nothing run; what is wrong is raised."""
    group = command()
    context = group.make_context("finebits", _command._in_front(words), obj=Screen())
    rest = [*context._protected_args, *context.args]
    while rest and hasattr(group, "list_commands"):
        name, group, rest = group.resolve_command(context, rest)
        if not rest:
            return str(name)  # a verb that is only named
        try:
            context = group.make_context(name, rest, parent=context, obj=Screen())
        except typer.Exit:  # --help
            return str(name)
        rest = [*context._protected_args, *context.args] if hasattr(group, "list_commands") else []
    return str(context.info_name)


@pytest.mark.parametrize("page", pages.shown(), ids=lambda page: page.stem)
def test_what_is_shown_is_there(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for words in pages.named(page.read_text(encoding="utf-8")):
        try:
            parsed(words)
        except Exception as e:  # typer's own classes change their names with its versions
            said = str(e.format_message() if hasattr(e, "format_message") else e)
            if not said.endswith("does not exist."):  # what a reader has
                wrong.append(f"finebits {' '.join(words)}: {said}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("words", ["plan r.yaml --no-such-option 3", "palm r.yaml", "data chick r.yaml"])
def test_what_is_not_there_is_seen(words: str) -> None:
    with pytest.raises(Exception, match="No such|neither an option"):
        parsed(words.split())


def test_pages_show_commands() -> None:
    assert sum(1 for page in pages.shown() for _ in pages.named(page.read_text(encoding="utf-8"))) > 50
