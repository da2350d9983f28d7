"""What was planned, and what was measured."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from finebits.plan.base import Plan
from finebits.report import cells, results, svg, timeline
from finebits.report.cells import Column, Table, percent, signed, size
from finebits.report.folder import Folder
from finebits.report.panels.base import Block, Panel

TERMS = 12  # colours for stacked pieces


def panel(run: Folder) -> Panel | None:
    plan = run.plan
    of_runs = [(name, run.memory[name]) for name in run.runs if name in run.memory]
    if not of_runs and not plan.memory:
        return None
    order = list(dict.fromkeys(term for by_term in [plan.memory, *(m["planned"] for _, m in of_runs)] for term, v in by_term.items() if v))
    colour = {term: f"t{i % TERMS}" for i, term in enumerate(order)}
    largest = max([plan.budget or 0, plan.peak, *(m.get("measured_peak") or 0 for _, m in of_runs)])
    unit, step = cells.unit(largest)
    show = lambda v: f"{v:,.{0 if largest >= 10 * step else 1}f} {unit}"  # noqa: E731
    rows, below = [], []
    if plan.budget is not None and reserve(plan):
        parts = [("plans stay below", (plan.budget - reserve(plan)) / step, "planned"), ("reserve", reserve(plan) / step, "reserve")]
        rows.append(svg.Bar("budget", parts, size(plan.budget), "budget"))
    for name, memory in of_runs:
        planned = sum(memory["planned"].values())
        pieces = [(term, v / step, f"{colour[term]} fill") for term, v in memory["planned"].items() if v]
        rows.append(svg.Bar(f"{name} planned", pieces, size(planned), name))
        measured = memory.get("measured_peak")
        if measured is not None:
            caption = f"{size(measured)}  {signed(results.deviation(planned, measured))}"
            rows.append(svg.Bar("measured", [("training peak", measured / step, "measured")], caption, name))
        below.append(replace(results.memory_table(memory), name=f"memory of {name}"))
    if not of_runs:
        pieces = [(term, v / step, f"{colour[term]} fill") for term, v in plan.memory.items() if v]
        rows.append(svg.Bar("training planned", pieces, size(plan.peak)))
        below.append(_planned_table(plan))
    main = run.memory.get(run.main)
    phases = list(main.get("rows") or []) if main else []
    done = {row["phase"] for row in phases}
    phases += [{"phase": k, "planned": v, "measured": None} for k, v in plan.rows.items() if k not in done]
    for row in phases:
        if row["planned"] is not None:
            rows.append(
                svg.Bar(f"{row['phase']} planned", [("peak", row["planned"] / step, "planned")], size(row["planned"]), row["phase"])
            )
        if row["measured"] is not None:
            off = results.deviation(row["planned"], row["measured"])
            caption = size(row["measured"]) + (f"  {signed(off)}" if off is not None else "")
            label = "measured" if row["planned"] is not None else f"{row['phase']} measured"
            rows.append(svg.Bar(label, [("peak", row["measured"] / step, "measured")], caption, row["phase"]))
    limit = None if plan.budget is None else (f"budget {size(plan.budget)}", plan.budget / step)
    chart = svg.fitted(partial(svg.bars, "Memory planned and measured", rows, show, "peak memory", limit))
    terms = main["planned"] if main else plan.memory
    key = [(colour[t], t, size(v)) for t, v in terms.items() if v]
    notes = [f"{size(nbytes)} of {term} stay in host memory, beside the budget." for term, nbytes in plan.host.items()]
    if plan.budget is not None and reserve(plan):
        held = f"{size(reserve(plan))} of the budget ({percent(reserve(plan) / plan.budget)}) are held in reserve"
        notes.append(f"{held}: no plan takes more than {size(plan.budget - reserve(plan))}.")
    notes += timeline.notes(run, phases)
    if main:
        base = f" ({size(main['baseline'])})" if main.get("baseline") is not None else ""
        notes.append(f"Peaks are above the process before the model loads{base}.")
        stored = main.get("stored")
        if stored:
            same = stored["planned"] == stored["measured"]
            against = "equal to the plan to the byte" if same else f"{stored['measured'] - stored['planned']:+,} bytes against the plan"
            notes.append(f"Stored weights: {size(stored['measured'])}, {against}.")
        if main.get("settings"):
            notes.append("Measured under " + ", ".join(f"{k}={v}" for k, v in main["settings"].items()) + ".")
    title = "Memory, planned and measured" if of_runs else "Memory, planned"
    blocks = [Block(chart, note=" ".join(notes), key=key, tables=below)]
    over = timeline.Timeline.of(run)
    if over.spans or over.held:
        said = "Boxes: the measured peak of a phase. Short lines: what was planned for it."
        said += " Curve: what was held at the end of every step." * (len(over.held) > 1)
        drawn = svg.fitted(lambda width: timeline.chart(over, plan.budget, width))
        blocks.append(Block(drawn, head="Over time", note=said, tables=over.tables()))
    return Panel("memory", title, blocks)


def reserve(plan: Plan) -> int:
    """Bytes of the budget that plans leave free."""
    return round((plan.budget or 0) * (plan.sizes.get("reserve") or 0.0))


def _planned_table(plan: Plan) -> Table:
    rows: list[tuple[Any, ...]] = [(k, v, v / plan.peak if plan.peak else None) for k, v in plan.memory.items()]
    rows.append(("training peak", plan.peak, None))
    strong = frozenset({len(rows) - 1})
    rows += [(f"{k} peak", v, None) for k, v in plan.rows.items()]
    return Table("memory", (Column("term"), Column("planned", size), Column("share", percent)), rows, strong)
