"""The rank of every matrix, where these were given out or chosen."""

from __future__ import annotations

from finebits.report import svg, tables, why
from finebits.report.folder import Folder
from finebits.report.panels.base import Block, Panel

SHADES = ("b2", "b3", "b4", "b8", "b16")  # from the lowest rank to the highest


def panel(run: Folder) -> Panel | None:
    ranks, table = why.ranks(run.plan), why.ranks_table(run.plan)
    if table is None:
        return None
    most = max(ranks.values()) or 1
    cells = []
    for i, name in enumerate(run.plan.modules):
        if name in ranks:
            layer, kind = tables.place(name)
            shade = SHADES[round((len(SHADES) - 1) * ranks[name] / most)]
            cells.append(svg.Cell(kind, "–" if layer is None else str(layer), shade, str(ranks[name]), i))
    layers = sorted({int(c.column) for c in cells if c.column != "–"})
    columns = [str(n) for n in layers] + ["–"] * any(c.column == "–" for c in cells)
    chart = svg.grid("Rank of every matrix", cells, list(dict.fromkeys(c.row for c in cells)), columns, "layer")
    total = f"{sum(ranks.values()):,} ranks over {len(ranks):,} matrices"
    lead = f"{total}, {why.giver(run.plan)}. Where the rank is 0 nothing is trained."
    return Panel("ranks", "Ranks", [Block(chart, tables=[table], open=True)], lead)
