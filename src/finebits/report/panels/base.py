"""What the page is made of: numbered panels of blocks, and the figures of the headline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from finebits.report.cells import Json, Table

COLOURS = 6  # line colours of the style sheet
LONGEST = 3000  # characters of one text that are shown


@dataclass(frozen=True)
class Tile:
    """One figure of the headline; `tone` is "good", "bad" or nothing."""

    label: str
    value: str
    below: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Block:
    """A chart with its tables, or text of one kind; the template decides by what is there."""

    chart: Markup | None = None
    head: str = ""
    note: str = ""
    key: Sequence[tuple[str, str, str]] = ()
    tables: Sequence[Table] = ()
    open: bool = False
    half: bool = False
    samples: Sequence[Json] = ()
    preview: Sequence[Json] = ()
    problems: Sequence[Json] = ()
    facts: Sequence[tuple[str, str]] = ()
    code: str = ""
    folded: str = ""  # what the code is, where it is shown only when asked for
    picked: bool = False  # has room for the error curves of a matrix
    cited: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """A numbered part of the page."""

    name: str
    title: str
    blocks: Sequence[Block]
    lead: str = ""
