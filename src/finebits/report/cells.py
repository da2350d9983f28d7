"""How a table of a run is written: numbers as people read them, and columns that know how their values are shown.

A cell holds the raw value. Three numbers in one cell are a value and its interval.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from finebits import registry, sizes

if TYPE_CHECKING:
    from finebits.formats.base import Format

Json = Mapping[str, Any]
ABSENT = "–"
INK = {"head": "2", "strong": "1", "label": "1", "same": "32", "ok": "32", "rounded": "33", "fail": "1;31", "free": "2"}


def short(format: Format | Json | None) -> str:
    """The short name of a number format: NF(bits=3, block=64, scale="bf16") -> "nf3-b64-bf16", no format -> "dense".

    Takes the value or its JSON. Scales in fp32 and symmetric grids are not mentioned; an asymmetric grid is marked a ("int4a-b128").

    >>> short(fb.NF(3, block=64, scale="bf16")), short(fb.Int(4, block=128, symmetric=False)), short(None)
    ('nf3-b64-bf16', 'int4a-b128', 'dense')
    """
    if format is None:
        return "dense"
    rest = dict(format if isinstance(format, Mapping) else registry.to_json(format))
    name = f"{rest.pop('paper')}{rest.pop('bits', '')}{'' if rest.pop('symmetric', True) else 'a'}"
    parts = [f"b{rest.pop('block')}"] if "block" in rest else []
    scale = rest.pop("scale", "fp32")
    parts += [] if scale == "fp32" else [short(scale) if isinstance(scale, Mapping) else str(scale)]
    return "-".join([name, *parts, *(f"{k}={v}" for k, v in rest.items())])


def columns(most: int = 100) -> int:
    """Of the terminal, from 80 to `most`.

    >>> 80 <= columns() <= 100
    True
    """
    return min(max(shutil.get_terminal_size((most, 24)).columns, 80), most)


def paint(text: str, ink: str, colour: bool) -> str:
    """`text` in the named ink, or as it is."""
    return f"\x1b[{INK[ink]}m{text}\x1b[0m" if colour and ink in INK else text


def unit(biggest: float) -> tuple[str, int]:
    """The binary unit in which `biggest` bytes read well, and its size.

    >>> unit(3 << 30)
    ('GiB', 1073741824)
    """
    power = max((i for i in range(len(sizes.BINARY)) if abs(biggest) >= 1024**i), default=0)
    return sizes.BINARY[power], 1024**power


def size(n: float | None) -> str:
    """Bytes for a reader: 383254528 -> "365.5 MiB".

    >>> size(383254528), size(None)
    ('365.5 MiB', '–')
    """
    return ABSENT if n is None else sizes.show(n)


def number(v: float | None, digits: int = 4) -> str:
    """A figure with `digits` decimals, in scientific notation where those would hide it.

    >>> number(1234.5), number(0.00001234), number(None)
    ('1,234.5000', '1.2e-05', '–')
    """
    if v is None:
        return ABSENT
    if not math.isfinite(v):
        return str(v)
    if v and abs(v) < 5 * 10.0**-digits:
        return f"{v:.1e}"
    return f"{v:,.{digits}f}"


def difference(v: float | None) -> str:
    """A figure with its sign.

    >>> difference(0.25), difference(-0.00001)
    ('+0.2500', '-1.0e-05')
    """
    return ABSENT if v is None else f"{v:+.4f}" if not v or abs(v) >= 5e-4 else f"{v:+.1e}"


def percent(v: float | None, digits: int = 1) -> str:
    """A share: 0.989 -> "98.9%".

    >>> percent(0.989), percent(None)
    ('98.9%', '–')
    """
    return ABSENT if v is None or not math.isfinite(v) else f"{100 * v:.{digits}f}%"


def signed(v: float | None) -> str:
    """A relative deviation with its sign: 0.019 -> "+1.9%"; "exact" for none at all.

    >>> signed(0.019), signed(0)
    ('+1.9%', 'exact')
    """
    return ABSENT if v is None else "exact" if v == 0 else f"{100 * v:+.1f}%"


def count(v: int | None) -> str:
    return ABSENT if v is None else f"{v:,}"


def plain(value: Any) -> str:
    """A setting for a reader: True -> "on", 2048 -> "2,048", mappings in braces.

    >>> plain(True), plain(2048), plain({"rank": 8})
    ('on', '2,048', '{rank 8}')
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} {plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) else text(value)


def clean(raw: str) -> str:
    """Names from files must not steer a terminal: control characters become their escapes.

    >>> clean("red" + chr(27)) == "red" + chr(92) + "x1b"
    True
    """
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in raw)


def text(v: Any) -> str:
    return ABSENT if v is None else clean(str(v))


def span(show: Callable[[float | None], str]) -> Callable[[Any], str]:
    """A value with its interval, each end shown as the value is.

    >>> span(number)((2.5, 2.25, 2.75)), span(number)((2.5, None, None))
    ('2.5000 [2.2500, 2.7500]', '2.5000')
    """

    def both(cell: Sequence[float | None]) -> str:
        v, lo, hi = cell
        return show(v) if lo is None or hi is None else f"{show(v)} [{show(lo)}, {show(hi)}]"

    return both


@dataclass(frozen=True)
class Column:
    """A head and how a value is shown; `parts` names the values of a cell that holds three. An `optional` one is left out where there is no
    room.

    >>> Column("stored", size).numeric, Column("module").numeric
    (True, False)
    """

    head: str
    show: Callable[[Any], str] = text
    parts: tuple[str, ...] = ()
    optional: bool = False

    @property
    def numeric(self) -> bool:
        return self.show is not text


@dataclass(frozen=True)
class Table:
    """Columns and raw rows; `strong` holds the indices of rows that are sums.

    >>> table = Table("formats", (Column("format"), Column("stored", size)), [("nf4-b64", 4718592), ("nf3-b64", 1572864)])
    >>> table.shown()
    [['nf4-b64', '4.5 MiB'], ['nf3-b64', '1.5 MiB']]
    """

    name: str
    columns: tuple[Column, ...]
    rows: list[tuple[Any, ...]]
    strong: frozenset[int] = field(default_factory=frozenset)

    def shown(self) -> list[list[str]]:
        return [[c.show(v) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]

    def text(self, colour: bool = False, width: int | None = None) -> str:
        """Aligned plain text, figures to the right. In a `width`, columns that may be missing go first, the last of them before the others, and
        then the widest names are cut.

        >>> print(Table("formats", (Column("format"), Column("stored", size)), [("nf4-b64", 4718592)]).text(), end="")
         format    stored
         nf4-b64  4.5 MiB
        """
        if width is not None and self._wide() > width and any(c.optional for c in self.columns):
            last = max(i for i, c in enumerate(self.columns) if c.optional)
            cut = lambda row: (*row[:last], *row[last + 1 :])  # noqa: E731
            return replace(self, columns=cut(self.columns), rows=[cut(r) for r in self.rows]).text(colour, width)
        shown, heads = self.shown(), [c.head for c in self.columns]
        wide = [max(len(r[i]) for r in [heads, *shown]) for i in range(len(heads))]
        names = [i for i, c in enumerate(self.columns) if not c.numeric]
        while width is not None and names and 1 + sum(wide) + 2 * (len(wide) - 1) > width and max(wide[i] for i in names) > 12:
            wide[max(names, key=lambda i: wide[i])] -= 1
        shown = [[v if len(v) <= w else v[: w - 1] + "…" for v, w in zip(row, wide, strict=True)] for row in shown]
        line = lambda cells: "  ".join(  # noqa: E731
            v.rjust(w) if c.numeric else v.ljust(w) for v, w, c in zip(cells, wide, self.columns, strict=True)
        ).rstrip()
        lines = [paint(line(heads), "head", colour)]
        lines += [paint(line(r), "strong" if i in self.strong else r[-1], colour) for i, r in enumerate(shown)]
        return "\n".join(f" {x}" for x in lines) + "\n"

    def _wide(self) -> int:
        shown = [[c.head for c in self.columns], *self.shown()]
        return sum(max(len(r[i]) for r in shown) for i in range(len(self.columns))) + 2 * (len(self.columns) - 1) + 1


# --- what a plan says ---------------------------------------------------------------------------------------------------------------
