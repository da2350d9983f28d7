"""Which bits every matrix has, and why."""

from __future__ import annotations

from functools import partial
from typing import Any

from finebits.plan.base import Plan
from finebits.report import svg, tables
from finebits.report.cells import Json
from finebits.report.folder import Folder
from finebits.report.panels.base import Block, Panel
from finebits.report.text import kl_line, solver_line


def _shade(code: float) -> str:
    """The colour class of a code width."""
    return next(f"b{b}" for b in (2, 3, 4, 8, 16) if code <= b or b == 16)


def panel(run: Folder) -> Panel | None:
    matrices = tables.matrices(run.plan)
    if not matrices:
        return None
    layers = sorted({m.layer for m in matrices if m.layer is not None})
    outside = any(m.layer is None for m in matrices)
    columns = [str(n) for n in layers] + (["–"] if outside else [])
    kinds = list(dict.fromkeys(m.kind for m in matrices))
    cells = [svg.Cell(m.kind, "–" if m.layer is None else str(m.layer), _shade(m.code), str(m.code), i) for i, m in enumerate(matrices)]
    axis = "layer" + (" (– stands outside the layers)" if outside else "")
    only = {m.format for m in matrices}
    heat = svg.fitted(partial(svg.grid, "Bits of every matrix", cells, kinds, columns, axis)) if len(only) > 1 else None
    formats = tables.formats_table(run.plan)
    code = {m.format: m.code for m in matrices}
    rows = [
        svg.Bar(name, [("", n, f"{_shade(code[name])} fill")], f"{n:,}" + (f"  ·  {b:.2f} bits a weight" if b is not None else ""))
        for name, n, _, _, b in formats.rows
    ]
    bars = svg.fitted(partial(svg.bars, "Matrices in every format", rows, lambda v: f"{v:,.0f}", "matrices", None), 520)
    protected = tables.most_protected(matrices)
    facts = [("Most protected", "; ".join(protected))] if protected else []
    if run.plan.solver:
        facts.append(("Solver", solver_line(run.plan.solver)))
    if run.plan.solver.get("kl"):
        facts.append(("Predicted", kl_line(run.plan.solver["kl"])))
    facts += [("Notice", notice) for notice in run.plan.notices] + list(tables.levers(run.plan).items())
    choose = any(len(m.menu) > 1 for m in matrices)
    if heat is None:
        lead = f"All {len(matrices)} matrices hold {only.pop()}, so there is no map to draw."
        lead += " Choose one below to see what other formats would have cost." * choose
    else:
        lead = (
            "The number in a cell is the width of one code in bits; scales come on top. Click a cell for the errors of all formats."
            * choose
        )
        lead = lead or "The number in a cell is the width of one code in bits; scales come on top."
    blocks = [
        Block(heat, tables=[tables.matrices_table(run.plan)], picked=choose),
        *([Block(bars, head="Formats", tables=[formats], half=True)] if heat is not None else []),
        Block(head="Solver and levers", facts=facts, half=heat is not None),
    ]
    return Panel("bits", "Bits per matrix", blocks, lead)


def menu(plan: Plan) -> Json:
    """What the heat map shows on hover. Names and sizes repeat from layer to layer, so each of them is written once: a name in two halves,
    about the number of its layer."""
    kinds: dict[tuple[str, ...], int] = {}
    names: dict[str, int] = {}
    shapes: dict[str, int] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    rows = []
    for m in tables.matrices(plan):
        listed = tuple((names.setdefault(name, len(names)), size) for name, size, _ in m.menu)
        chosen = names.setdefault(m.chosen, len(names))
        shape = shapes.setdefault(m.dimensions or "", len(shapes))
        losses = [tables.brief(loss) for *_, loss in m.menu]
        halves = (m.name,) if m.layer is None else (m.name.removesuffix(f"{m.layer}.{m.kind}"), f".{m.kind}")
        kind = kinds.setdefault(halves, len(kinds))
        rows.append([kind, m.layer, shape, chosen, m.bytes, tables.brief(m.loss), sizes.setdefault(listed, len(sizes)), losses])
    return {"kinds": list(kinds), "names": list(names), "shapes": list(shapes), "sizes": [list(map(list, s)) for s in sizes], "rows": rows}
