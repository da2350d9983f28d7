"""Memory over the time of a job: the measured peak of every phase, what training held step by step, and the budget over both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from finebits.report import cells, summary, svg
from finebits.report.cells import Column, Json, Table, count, size
from finebits.report.folder import Folder
from finebits.runfolder import EXPORT, FULL

POINTS = 160  # a longer run is drawn by the largest of neighbouring steps
PAUSE = 1.0  # seconds that a pause between two sessions takes on the axis


@dataclass(frozen=True)
class Span:
    """A phase: seconds of work from `start` to `end`, bytes at its peak."""

    name: str
    start: float
    end: float
    measured: int
    planned: int | None


@dataclass(frozen=True)
class Timeline:
    """`held` is (seconds of work, step, bytes) at the end of steps."""

    spans: Sequence[Span]
    held: Sequence[tuple[float, int, int]]

    @classmethod
    def of(cls, run: Folder) -> Timeline:
        """That of the run which followed the plan, with the scoring before it and the export behind it; pauses are left out."""
        parts = [run.events[name] for name in (FULL, run.main, EXPORT) if name in run.events]
        found = [(e["since"], e["t"], e) for part in parts for e in part if e.get("event") == "peak" and e.get("bytes") is not None]
        steps = [(e["t"], int(e["step"]), held) for part in parts for e, held in _held(part, run.memory.get(run.main) or {})]
        clock = _clock([t for a, b, _ in found for t in (a, b)] + [t for t, *_ in steps], run.record.get("sessions") or ())
        planned = run.plan.rows | ({"train": run.plan.peak} if run.plan.memory else {})
        spans = [Span(e["phase"], clock[a], clock[b], e["bytes"], planned.get(e["phase"])) for a, b, e in found]
        peak = (run.memory.get(run.main) or {}).get("measured_peak")
        if steps and peak is not None and not any(s.name == "train" for s in spans):
            spans.append(Span("train", clock[steps[0][0]], clock[steps[-1][0]], peak, planned.get("train")))
        per = -(-len(steps) // POINTS) or 1
        thin = [max(steps[i : i + per], key=lambda s: s[2]) for i in range(0, len(steps), per)]
        return cls(sorted(spans, key=lambda s: (s.start, s.end)), [(clock[t], step, held) for t, step, held in thin])

    def tables(self) -> list[Table]:
        """What the chart shows."""
        rows = [(s.name, s.start, s.end, s.planned, s.measured) for s in self.spans]
        heads = Column("phase"), Column("from", summary.took), Column("to", summary.took), Column("planned peak", size)
        phases = Table("memory of every phase", (*heads, Column("measured peak", size)), rows)
        held = Table("memory while training", (Column("step", count), Column("at", summary.took), Column("held", size)), [])
        held.rows.extend((step, at, nbytes) for at, step, nbytes in self.held)
        return [table for table in (phases, held) if table.rows]


def _held(events: Sequence[Json], memory: Json) -> list[tuple[Json, int]]:
    """Steps with the bytes that were held at their end, as the budget counts them: on the device, or above the process before the model."""
    baseline, found = memory.get("baseline"), []
    for e in events:
        baseline = e.get("baseline", baseline)
        if e.get("event") == "step" and ("device" in e or ("rss" in e and baseline is not None)):
            found.append((e, int(e["device"] if "device" in e else max(e["rss"] - baseline, 0))))
    return found


def _clock(times: Sequence[float], sessions: Sequence[Json]) -> dict[float, float]:
    """Seconds of work at each time; between two sessions hardly any pass."""
    worked = [(s["begun"], s["begun"] + s["seconds"]) for s in sessions if s.get("begun") is not None and s.get("seconds") is not None]
    clock, at, before = dict[float, float](), 0.0, None
    for t in sorted(set(times)):
        if before is not None:
            pause = any(before < a and end <= t for (_, end), (a, _) in zip(worked, worked[1:], strict=False)) and t - before > PAUSE
            at += PAUSE if pause else t - before
        clock[t], before = at, t
    return clock


def chart(timeline: Timeline, budget: int | None, width: float = 1080, height: float = 300) -> Markup:
    """Boxes as high as the peaks and as wide as the phases took, each with its name; a line through the steps; dashes at the budget."""
    most = max(
        [budget or 0, *(s.measured for s in timeline.spans), *(s.planned or 0 for s in timeline.spans), *(h for *_, h in timeline.held), 1]
    )
    end = max([s.end for s in timeline.spans] + [t for t, *_ in timeline.held] + [1e-3])
    unit, step = cells.unit(most)
    clock, per = ("minutes", 60.0) if end > 300 else ("seconds", 1.0)
    narrow = width < svg.STACKED
    left, right, top, bottom = (62.0 if narrow else 74.0), 14.0, 42.0, height - 46
    x = lambda v: left + (width - left - right) * v / end  # noqa: E731
    y = lambda v: bottom - (bottom - top) * v / most  # noqa: E731
    marks: list[Markup] = []
    for t in svg.ticks(0, most / step, 4):
        marks += [svg.line(left, y(t * step), width - right, y(t * step), "grid")]
        marks += [svg.text_at(left - 8, y(t * step) + 4, f"{t:g} {unit}", "tick", "end")]
    for t in svg.ticks(0, end / per, 4 if narrow else 8):
        marks += [svg.line(x(t * per), bottom, x(t * per), bottom + 4, "axis")]
        marks += [svg.text_at(x(t * per), bottom + 18, f"{t:g}", "tick", "middle")]
    names: list[tuple[float, float, float, str]] = []
    for s in timeline.spans:
        a, b = x(s.start), max(x(s.end), x(s.start) + 3)
        planned = f"\nplanned {size(s.planned)}" if s.planned is not None else ""
        over = "over" if budget is not None and s.measured > budget else ""
        tip = f"{s.name}, {summary.took(s.end - s.start)}\nmeasured {size(s.measured)}{planned}"
        marks.append(svg.box(a, y(s.measured), b - a, bottom - y(s.measured), f"phase {over}".strip(), tip))
        if s.planned is not None:
            marks.append(svg.line(a - 2, y(s.planned), b + 2, y(s.planned), "goal"))
        word = f"{s.name} {size(s.measured)}" if not narrow else s.name
        half = svg.wide(word) / 2
        at, up = min(max((a + b) / 2, left + half), width - right - half), y(max(s.measured, s.planned or 0)) - 6
        while any(abs(at - other) < half + k and abs(up - v) < 13 for other, v, k, _ in names):
            up -= 13
        names.append((at, up, half, word))
    if len(timeline.held) > 1:
        d = "".join(f"{'L' if i else 'M'}{x(t):.1f} {y(h):.1f}" for i, (t, _, h) in enumerate(timeline.held))
        marks.append(svg.tag("path", d=d, class_="smooth s0"))
    if budget is not None:
        marks += [svg.line(left, y(budget), width - right, y(budget), "limit")]
        marks += [svg.text_at(width - right, y(budget) - 5, f"budget {size(budget)}", "limit-word", "end")]
    marks += [svg.text_at(at, max(up, 11.0), word, "at-word", "middle") for at, up, _, word in names]
    marks.append(svg.line(left, bottom, width - right, bottom, "axis"))
    marks.append(svg.text_at((left + width - right) / 2, height - 8, f"{clock} of work", "axis-word", "middle"))
    return svg.drawing(width, height, "Memory over time", *marks)


def notes(run: Folder, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of the phases that took more than the budget: by how much, and what that means."""
    budget = run.plan.budget
    if budget is None:
        return []
    said = []
    for row in rows:
        measured, planned = row["measured"] or 0, row["planned"]
        if measured <= budget:
            continue
        off = f"{row['phase']} took {size(measured - budget)} more than the budget"
        if planned is not None and planned <= budget:
            said.append(f"{off}; {size(planned)} were planned, so the plan counted too little for it.")
        elif planned is not None:
            said.append(f"{off}, as planned ({size(planned)}): the budget was not asked of this phase.")
        else:
            said.append(f"{off}; nothing is planned for it, since it comes once training is over and can run on another machine.")
    return said
