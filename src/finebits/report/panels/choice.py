"""What else there was, and what the rest of the budget could buy."""

from __future__ import annotations

from functools import partial

from finebits.report import cells, svg, tables, why
from finebits.report.cells import size
from finebits.report.folder import Folder
from finebits.report.panels.base import Block, Panel
from finebits.report.panels.memory import reserve


def panel(run: Folder) -> Panel | None:
    plan = run.plan
    table = tables.alternatives_table(plan)
    if table is None:
        return None
    rows, points = plan.solver["alternatives"], plan.solver.get("pareto") or []
    blocks, word = [], tables.loss_word(plan)
    if len(points) > 1:
        unit, step = cells.unit(max(plan.budget or 0, *(p["peak"] for p in points)))
        marks = []
        pulled = any(row["name"].endswith(", levers pulled") for row in rows)
        asked = next((row["levers"] for row in rows if row["name"].endswith("everywhere")), "")
        for row in rows:
            hue = "s1" if row["chosen"] else "s4" if row["name"].startswith("mixed") else "neutral"
            tip = f"{row['name']}\n{size(row['peak'])}   {tables.bits(row['bits'])} bits   {word} {tables.figures(row['loss'])}\n{row['levers']}"
            name = "chosen" if row["chosen"] else row["name"].removesuffix(", levers pulled")
            if pulled and row["levers"] == asked and not row["chosen"]:
                hue, name = f"{hue} hollow", ""
            marks.append(svg.Mark(row["peak"] / step, row["loss"], hue, name, tip, row["chosen"]))
        for p in points:
            marks.append(svg.Mark(p["peak"] / step, p["loss"], "s0", "", f"mixed\n{size(p['peak'])}   {word} {tables.figures(p['loss'])}"))
        measured = (run.memory.get(run.main) or {}).get("measured_peak")
        if measured is not None and plan.solver.get("loss") is not None:
            tip = f"measured {size(measured)}, planned {size(plan.peak)}"
            marks.append(svg.Mark(measured / step, plan.solver["loss"], "s2", "measured", tip))
        marks.sort(key=lambda m: bool(m.word))  # names over the curve's own points
        line = [(p["peak"] / step, p["loss"]) for p in points]
        limit = None if plan.budget is None else (f"budget {size(plan.budget)}", plan.budget / step)
        show = lambda v: f"{v:,.{0 if points[-1]['peak'] >= 20 * step else 1}f} {unit}"  # noqa: E731
        chart = svg.fitted(partial(svg.front, "Memory against expected loss", [("s0", line)], marks, "training peak", word, limit, show))
        curve = tables.pareto_table(plan)
        note = "The line is the best mixed plan of every budget, with the levers of the chosen one."
        blocks.append(Block(chart, tables=[curve], note=note + (" Open circles: levers as asked." if pulled else "")))
    note = ""
    if plan.budget is not None and reserve(plan):
        note = f"What fits stays below {size(plan.budget - reserve(plan))}: {size(reserve(plan))} of the budget are held in reserve."
    blocks.append(Block(head="Alternatives", note=note, tables=[table], open=True))
    adapters = why.adapters_table(plan)
    if adapters is not None:
        blocks.append(Block(head="Adapters", note=why.CHOSEN, tables=[adapters], open=True))
    rest = tables.buys_table(plan)
    if rest is not None:
        note = f"The job takes {size(plan.need)} of {size(plan.budget)}. Each line alone, with what the whole job would take then."
        blocks.append(Block(head="What the rest could buy", note=note, tables=[rest], open=True))
    kind = "measured on the weights" if plan.solver.get("measured") else "of normal data: the weights were not read"
    nats = plan.solver.get("objective") in ("fisher", "kl")
    what = "second-order estimates of the KL in nats a trained token" if nats else "relative errors"
    lead = f"Expected {word}: the sum of the matrices' {what} before training, {kind}. Lower is better; fine-tuning mends part of it."
    return Panel("choice", "What fits", blocks, lead)
