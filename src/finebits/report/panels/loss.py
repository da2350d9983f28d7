"""The loss of every step, a curve a run, and the held-out loss where it was taken meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence

from finebits.report import svg
from finebits.report.cells import Column, Json, Table, count, number
from finebits.report.folder import Folder
from finebits.report.panels.base import COLOURS, Block, Panel
from finebits.runfolder import FULL

POINTS = 100  # a longer loss curve is drawn as means over neighbouring steps


def panel(run: Folder) -> Panel | None:
    series, notes, eval_dots = [], [], False
    for i, name in enumerate(n for n in run.runs if n in run.events):
        raw = _steps(run.events[name], "step")
        lost = [s for s, v in raw if not math.isfinite(v)]
        if lost:
            notes.append(f"{name}: the loss of {len(lost)} steps is not finite (first at step {lost[0]:g}); they are not drawn.")
        raw = [(s, v) for s, v in raw if math.isfinite(v)]
        if len(raw) > POINTS:
            per = -(-len(raw) // POINTS)
            groups = [raw[k : k + per] for k in range(0, len(raw), per)]
            raw = [(g[-1][0], sum(v for _, v in g) / len(g)) for g in groups]
            notes.append(f"{name}: every point is the mean of {per} steps.")
        if not raw:
            continue
        half = max(len(raw) // 16, 1)
        dots = [(s, v) for s, v in _steps(run.events[name], "eval") if math.isfinite(v)]
        eval_dots |= bool(dots)
        smooth = _smooth(raw, half)
        series.append(svg.Curve(name, f"s{i % COLOURS}", raw, smooth, dots, spikes(raw, smooth)))
    notes += [f"{name}: the last line of events.jsonl is cut off and left out." for name in run.unfinished]
    if not series:
        return None
    halves = sorted({max(len(s.raw) // 16, 1) for s in series})
    window = " or ".join(str(2 * h + 1) for h in halves)
    lead = f"Faint: every step. Strong: centred mean over {window} points, fewer towards the ends." + (
        " Rings: evaluation during training." if eval_dots else ""
    )
    if jumped := {c.name: [f"{s:g}" for s, _ in c.spikes] for c in series if c.spikes}:
        notes += [
            f"{name} jumps at step{'s' * (len(at) > 1)} {', '.join(at[:6])}{', …' if len(at) > 6 else ''}." for name, at in jumped.items()
        ]
    expected = start(run)
    if expected is not None:
        notes.append("Expected start: the full-precision model's held-out loss and the predicted KL (80 %) on top of it.")
    axes = "step", "loss (nats per trained token)"
    chart = svg.fitted(lambda width: svg.curves("Training loss", series, *axes, width=width, band=expected))
    steps = sorted({s for c in series for s, _ in c.raw})
    values = [(dict(c.raw), dict(c.smooth)) for c in series]
    rows = [(int(s), *(None if s not in v else round(v[s], 4) for pair in values for v in pair)) for s in steps]
    heads = [Column(h, number) for c in series for h in (c.name, f"{c.name} smoothed")]
    table = Table("loss of every step", (Column("step", count), *heads), rows)
    ends = [(c.name, int(c.raw[-1][0]), c.raw[0][1], c.smooth[-1][1], min(v for _, v in c.smooth)) for c in series]
    end_heads = (Column("run"), Column("steps", count), *(Column(h, number) for h in ("first step", "end, smoothed", "lowest, smoothed")))
    tables = [Table("end of every run", end_heads, ends), table]
    if met := sorted({s for c in series for s, _ in c.dots}):
        found = [(c.name, dict(c.dots)) for c in series if c.dots]
        heads = [Column(f"{name} held-out loss", number) for name, _ in found]
        rows = [(int(s), *(None if s not in dots else round(dots[s], 4) for _, dots in found)) for s in met]
        tables.insert(1, Table("evaluation while training", (Column("step", count), *heads), rows))
    return Panel("loss", "Training loss", [Block(chart, note=" ".join(notes), tables=tables)], lead)


SPIKE = 6.0  # deviations of the residuals' median that make a step a spike


def spikes(raw: Sequence[svg.Point], smooth: Sequence[svg.Point]) -> list[svg.Point]:
    """Points that lie far above the smoothed line, by the median of all distances from it; none of a short run.

    >>> raw = [(float(i), 1.0 + 0.01 * (i % 3)) for i in range(20)]
    >>> raw[7] = (7.0, 2.0)
    >>> spikes(raw, [(s, 1.01) for s, _ in raw])
    [(7.0, 2.0)]
    """
    if len(raw) < 12:
        return []
    off = [v - w for (_, v), (_, w) in zip(raw, smooth, strict=True)]
    usual = sorted(map(abs, off))[len(off) // 2] * 1.4826
    return [point for point, d in zip(raw, off, strict=True) if d > SPIKE * usual > 0]


def start(run: Folder) -> tuple[str, float, float] | None:
    """Where the loss is expected to begin: what the plan predicts of the KL over the loss of the full-precision model."""
    predicted = (run.plan.solver.get("kl") or {}).get("interval")
    full = next((e.get("loss") for e in (run.evaluation or {}).get("entries", ()) if e["key"] == FULL), None)
    return None if predicted is None or full is None else ("expected start", full + predicted[0], full + predicted[-1])


def _steps(events: Sequence[Json], kind: str) -> list[svg.Point]:
    """(step, loss) of one kind of event; a step that was done again after a resume counts once, the last time."""
    by_step = {float(e["step"]): float(e["loss"]) for e in events if e.get("event") == kind and e.get("loss") is not None and "step" in e}
    return sorted(by_step.items())


def _smooth(points: Sequence[svg.Point], half: int) -> list[svg.Point]:
    """Centred means; the window shrinks evenly towards both ends so that nothing is shifted."""
    smooth = []
    for i, (s, _) in enumerate(points):
        k = min(half, i, len(points) - 1 - i)
        near = points[i - k : i + k + 1]
        smooth.append((s, sum(v for _, v in near) / len(near)))
    return smooth
