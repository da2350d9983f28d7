"""What was chosen among starts, and what refinements of them did."""

from __future__ import annotations

import math

from finebits.report import results, svg, tables
from finebits.report.cells import Json, count
from finebits.report.folder import Folder
from finebits.report.panels.base import Block, Panel

SHADES = ("b16", "b4", "b2", "b8", "b3")  # of what was chosen, the most frequent first


def panel(run: Folder) -> Panel | None:
    blocks = [b for name, choices in run.choices.items() for b in _chosen(run, name, choices)]
    blocks += [_refined(name, losses) for name, losses in run.refined.items()]
    return Panel("start", "How the adapters start", blocks) if blocks else None


def _chosen(run: Folder, name: str, choices: Json) -> list[Block]:
    of = {m.name: (i, m) for i, m in enumerate(tables.matrices(run.plan))}
    table, starts = results.choices_table(choices), results.starts_table(choices)
    colour = {start: SHADES[i % len(SHADES)] for i, (start, *_) in enumerate(starts.rows)}
    places = [(*of[row[0]], row) for row in table.rows if row[0] in of]
    columns = [str(n) for n in sorted({m.layer for _, m, _ in places if m.layer is not None})]
    columns += ["–"] if any(m.layer is None for _, m, _ in places) else []
    cells = [svg.Cell(m.kind, "–" if m.layer is None else str(m.layer), colour[row[1]], f"{100 * row[2]:.0f}", i) for i, m, row in places]
    kinds = list(dict.fromkeys(m.kind for _, m, _ in places))
    draw = lambda w: svg.grid("What won every matrix", cells, kinds, columns, "layer", w)  # noqa: E731
    chart = svg.fitted(draw) if cells else None
    key = [(colour[start], start, f"{count(won)} of {len(choices)}") for start, _, won, _ in starts.rows]
    note = "The number in a cell is the output error that is left, in percent of that of the quantized weight alone (zeros)."
    head = f"{name}: the start with the least output error"
    return [Block(chart, head=head, note=note, key=key, tables=[table]), Block(tables=[starts], open=True)]


def _refined(name: str, losses: Json) -> Block:
    table = results.refined_table(losses)
    steps = [(float(i), first, last) for i, (_, first, last, _) in enumerate(table.rows) if math.isfinite(first) and math.isfinite(last)]
    chart = None
    if len(steps) > 1:
        both = [(word, [(i, v[k]) for i, *v in steps]) for k, word in enumerate(("first epoch", "last epoch"))]
        series = [svg.Curve(word, f"s{k}", points, points) for k, (word, points) in enumerate(both)]
        axes = "block, in order", "loss on the calibration rows"
        chart = svg.fitted(lambda w: svg.curves("Losses of the refinement", series, *axes, w))
    note = "Mean loss on the calibration rows against the unquantized model. Where a refinement lost more in its last epoch, it was undone."
    return Block(chart, head=f"{name}: refined on the calibration rows", note=note, tables=[table], open=chart is None)
