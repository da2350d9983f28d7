"""The rank of every matrix, where these were given out or chosen."""

from __future__ import annotations

from collections import Counter
from functools import partial

from finebits.report import svg, tables, why
from finebits.report.cells import Column, Table, count
from finebits.report.folder import Folder
from finebits.report.panels.base import Block, Panel

SHADES = ("b2", "b3", "b4", "b8", "b16")  # from the lowest rank to the highest


def panel(run: Folder) -> Panel | None:
    ranks, table = why.ranks(run.plan), why.ranks_table(run.plan)
    if table is None:
        return _alike(run)
    most = max(ranks.values()) or 1
    cells = []
    for i, name in enumerate(run.plan.modules):
        if name in ranks:
            layer, kind = tables.place(name)
            shade = SHADES[round((len(SHADES) - 1) * ranks[name] / most)]
            cells.append(svg.Cell(kind, "–" if layer is None else str(layer), shade, str(ranks[name]), i))
    layers = sorted({int(c.column) for c in cells if c.column != "–"})
    columns = [str(n) for n in layers] + ["–"] * any(c.column == "–" for c in cells)
    kinds = list(dict.fromkeys(c.row for c in cells))
    chart = svg.fitted(partial(svg.grid, "Rank of every matrix", cells, kinds, columns, "layer"))
    total = f"{sum(ranks.values()):,} ranks over {len(ranks):,} matrices"
    lead = f"{total}, {why.giver(run.plan)}. Where the rank is 0 nothing is trained."
    return Panel("ranks", "Ranks", [Block(chart, tables=[table], open=True)], lead)


def _alike(run: Folder) -> Panel | None:
    """The panel where every adapter is like every other, or of a few kinds that the recipe names: a sentence for each."""
    adapters = Counter((why.named(s.adapter), why.named(s.init)) for s in run.plan.modules.values() if s.adapter is not None)
    if not adapters:
        return None
    rows = [(adapter, start, n) for (adapter, start), n in adapters.most_common()]
    table = Table("adapters", (Column("adapter"), Column("start"), Column("matrices", count)), rows)
    adapter, start, n = rows[0]
    lead = (
        f"All {n:,} adapters are {adapter} and start as {start}, so there is no map to draw." if len(rows) == 1 else "As the recipe says."
    )
    return Panel("ranks", "Ranks", [Block(tables=[table], open=True)], lead)
