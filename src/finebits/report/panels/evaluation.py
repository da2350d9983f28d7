"""How the models score on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from finebits.report import cells, results, svg
from finebits.report.cells import Json, count, number, percent
from finebits.report.folder import Folder
from finebits.report.panels.base import COLOURS, Block, Panel

CHARTS = (  # of the evaluation: key, axis, how a value is shown, its scale on the axis, whether the axis starts at zero
    ("loss", "held-out loss (nats per {unit})", number, 1, False),
    ("kl", "KL to full precision (nats per {unit})", number, 1, True),
    ("accuracy", "accuracy (%)", percent, 100, False),
    ("top1", "top-1 agreement with full precision (%)", percent, 100, False),
    ("gap_closed", "gap between untuned and 16-bit LoRA closed (%)", percent, 100, True),
)


def panel(run: Folder) -> Panel | None:
    if not run.evaluation or not run.evaluation.get("entries"):
        return None
    entries = run.evaluation["entries"]
    blocks = []
    unit = run.evaluation.get("unit", "tokens").removesuffix("s")
    for quantity, template, show, times, zero in CHARTS:
        axis = template.format(unit=unit)
        marks = []
        for e in entries:
            if e.get(quantity) is None:
                continue
            ends = (e.get("intervals") or {}).get(quantity) or (None, None)
            low, high = (None if v is None else times * v for v in ends)
            shown = cells.span(show)((e[quantity], *ends))
            marks.append(svg.Dot(e["name"], times * e[quantity], low, high, _hue(run, e), shown))
        if marks:
            blocks.append(Block(svg.fitted(partial(svg.dots, axis, marks, axis, zero), 520), half=True))
    blocks.append(Block(tables=[results.evaluation_table(run.evaluation)], open=True))
    if (liked := results.preference_table(run.evaluation)).rows:
        note = (
            "Accuracy is the share of answers that the model prefers as they were liked; the margin is the objective's, against the start."
        )
        blocks.append(Block(head="Preferences", note=note, tables=[liked], open=True))
    pairs = results.paired_table(run.evaluation)
    if pairs.rows:
        note = "Both models on the same rows. “Lower” and “higher” mean that the interval leaves out zero."
        blocks.append(Block(head="Paired differences", note=note, tables=[pairs], open=True))
    verdict, few = results.verdict(run.evaluation), results.too_few(run.evaluation)
    over = (
        f"{count(run.evaluation.get('rows'))} held-out rows, {count(run.evaluation.get('tokens'))} {run.evaluation.get('unit', 'tokens')}. "
    )
    lines = f"No intervals: {few}." if few else "Lines are 95% intervals by resampling rows."
    lead = f"{verdict} " * bool(verdict) + over + f"Open circles are starting points, filled ones have been trained. {lines}"
    if moved(entries):
        lead += (
            " KL and agreement compare with the untuned full-precision model: tuning is meant to move away from it, so for tuned models a larger"
            " KL is no damage. They judge starts and exports; tuned models are judged by their loss."
        )
    return Panel("evaluation", "Evaluation", blocks, lead)


def moved(entries: Sequence[Json]) -> bool:
    """Is there a tuned model that is farther from full precision than its start?"""
    kl = {e["key"]: e["kl"] for e in entries if e.get("kl") is not None}
    return any(kl[key] > kl[f"{key}_start"] for key in kl if f"{key}_start" in kl)


def _hue(run: Folder, entry: Json) -> str:
    """A run keeps its colour in every chart; its starting point is hollow."""
    key = run.main if entry["key"] == "export" else entry["key"].removesuffix("_start")
    colour = f"s{run.runs.index(key) % COLOURS}" if key in run.runs else "neutral"
    return f"{colour} hollow" if entry.get("stage") == "start" else colour
