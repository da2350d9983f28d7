"""The pages of the site and what stands in them, for tests/docs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`(finebits [^`]*)`")


def shown() -> list[Path]:
    """Pages whose commands are to exist: all but results and decisions, which tell of earlier days."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "guide").glob("*.md"))]
    return [page for page in pages if page.name != "results.md"]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command line in console blocks: what follows a $, without comments.

    >>> list(commands("```console\\n$ finebits list    # all\\nout\\n```\\n"))
    [['finebits', 'list']]
    """
    for block in CONSOLE.findall(text):
        for line in block.splitlines():
            if line.startswith("$ "):
                yield shlex.split(line[2:], comments=True)


def finebits(words: list[str]) -> Iterator[list[str]]:
    """The arguments of every finebits in a line, which may have several behind && and |.

    >>> list(finebits(["echo", "hi", "|", "finebits", "chat", "R"]))
    [['chat', 'R']]
    """
    part: list[str] = []
    for word in [*words, "&&"]:
        if word in ("&&", "|", ";"):
            if part[:1] == ["finebits"]:
                yield part[1:]
            part = []
        else:
            part.append(word)


def named(text: str) -> Iterator[list[str]]:
    """Arguments of every finebits that a page shows, in console blocks and between backticks."""
    for words in commands(text):
        yield from finebits(words)
    for line in INLINE.findall(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        yield shlex.split(line, comments=True)[1:]
