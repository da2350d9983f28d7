"""One self-contained page for a plan or a run: inline style, drawings and script, nothing fetched, every text escaped.

A panel whose file is missing is left out. What a stranger wrote (samples, data, recipe) only ever appears as text: the template escapes,
and the page's own content security policy forbids every request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from finebits.plan.base import Plan
from finebits.report.cells import Table
from finebits.report.folder import Folder, read
from finebits.report.panels import bits, blocks, choice, data, evaluation, export, headline, loss, memory, ranks, reproduce, samples, start
from finebits.report.panels.base import Panel, Tile

FIGURES = (
    ",".join(f".n{i} td:nth-child({i})" for i in range(1, 25)) + "{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}"
)
PANELS = (memory, choice, bits, blocks, ranks, start, loss, evaluation, samples, export, data, reproduce)


@dataclass(frozen=True)
class Live:
    """What the page needs when a server stands behind it: the state of its controls as JSON, the lengths to choose from, and how long the
    solve took."""

    state: str
    lengths: Sequence[int]
    length: int
    pulled: bool
    milliseconds: float


def plan_page(plan: Plan, live: Live | None = None) -> str:
    """The page of a plan before anything has run: budget, memory by term, alternatives, bits, solver, references. With `live` it has a
    slider for the budget, and asks the server that it came from to solve again."""
    return _render(Folder(plan), live)


def run_page(folder: Path, going: str = "") -> str:
    """The page of a run folder. Only plan.json must be there; raises ValueError naming the file that cannot be read. `going`: how the run goes,
    as the server of the page tells it in JSON; the page then asks that server for news."""
    return _render(read(Path(folder)), going=going)


def _render(run: Folder, live: Live | None = None, going: str = "") -> str:
    panels = [p for p in (module.panel(run) for module in PANELS) if p is not None]
    return rendered(_title(run.plan.model), run.name, run.plan.hash, headline.tiles(run), panels, bits.menu(run.plan), live, going)


def rendered(
    title: str,
    name: str,
    hash: str,
    tiles: Sequence[Tile],
    panels: Sequence[Panel],
    menu: Any = (),
    live: Live | None = None,
    going: str = "",
) -> str:
    """The page of these panels; `menu` is what hovering over a matrix shows."""
    wanted = ("page.js", True), ("curves.js", menu), ("live.js", live), ("following.js", going)
    scripts = [name for name, needed in wanted if needed]
    return _template().render(
        title=title,
        name=name,
        hash=hash,
        tiles=tiles,
        panels=panels,
        menu=Markup(json.dumps(menu, separators=(",", ":")).replace("<", r"\u003c")),
        style=Markup(_file("page.css") + FIGURES),
        script=Markup("".join(map(_file, scripts))),
        live=live,
        going=going,
    )


def _title(model: str) -> str:
    """A hub id as it is, a path by its last part."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model or "unnamed model"


@cache
def _file(name: str) -> str:
    return resources.files("finebits.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    room = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    room.filters["cells"] = _cells
    room.filters["figures"] = lambda table: " ".join(f"n{i}" for i, c in enumerate(table.columns, 1) if c.numeric)
    return room.from_string(_file("page.html"))


def _cells(table: Table) -> list[tuple[bool, list[tuple[str, str | None]]]]:
    """Rows as (is a sum, [(shown, raw value for sorting and CSV)])."""
    rows = []
    for i, (shown, raw) in enumerate(zip(table.shown(), table.rows, strict=True)):
        values = [None if isinstance(v, str) else "" if v is None else _raw(v) for v in raw]
        rows.append((i in table.strong, [(s, None if s == r else r) for s, r in zip(shown, values, strict=True)]))
    return rows


def _raw(v: Any) -> str:
    return "|".join("" if x is None else f"{x:.6g}" if isinstance(x, float) else str(x) for x in (v if isinstance(v, tuple) else (v,)))
