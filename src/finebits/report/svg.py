"""Charts as inline SVG: scales, axes and marks, no library. Colours are classes of the page, so that light, dark and print share them.

Every function returns markup with all text escaped. Bars start at zero. `data-tip` holds what the page shows on hover.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Show = Callable[[float], str]
Point = tuple[float, float]


def tag(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """One element. A trailing underscore in a name is dropped, the others become hyphens; None leaves an attribute out.

    >>> tag("text", "a < b", x=2.0, class_="label")
    Markup('<text x="2" class="label">a &lt; b</text>')
    """
    spelled = "".join(f' {k.rstrip("_").replace("_", "-")}="{_plain(v)}"' for k, v in attributes.items() if v is not None)
    inside = Markup("").join(children)
    return Markup(f"<{name}{spelled}>{inside}</{name}>" if children else f"<{name}{spelled}/>")


def _plain(v: object) -> object:
    return f"{v:.1f}".removesuffix(".0") if isinstance(v, float) else escape(v)


def drawing(width: float, height: float, title: str, *children: Markup) -> Markup:
    """The root of a chart; `title` is what a screen reader says. One with marks that tell something takes the keyboard: arrows step through
    them."""
    inside = Markup("").join(children)
    told = "data-tip=" in inside or "data-m=" in inside
    said = f"{title}. Arrow keys step through it; the table holds its figures." if told else f"{title}. The table holds its figures."
    # the viewBox attribute keeps its capital letter
    box = Markup(f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width * 1.25:.0f}px"')
    keys = Markup(' tabindex="0"' if told else "")
    return Markup(f'<svg {box} role="img" aria-label="{escape(said)}"{keys}>{inside}</svg>')


NARROW = 336.0  # pixels that a panel has on a phone
STACKED = 480.0  # a drawing below this many has its labels over what they name, and a heat map its layers downwards


def fitted(draw: Callable[[float], Markup], width: float = 1080) -> Markup:
    """A chart drawn twice: for a screen, and for a phone; the page shows the one that its place has room for.

    >>> fitted(lambda width: bars("t", [], str, "", width=width)).count("<svg")
    2
    """
    size = "full" if width > 700 else "part"
    small = Markup(re.sub(r' data-tip="[^"]*"', " data-tip", draw(NARROW)))  # the page reads them off the other drawing, mark by mark
    return Markup(f'<div class="large {size}">{draw(width)}</div><div class="small">{small}</div>')


def ticks(lo: float, hi: float, about: int = 5) -> list[float]:
    """Round numbers from lo to hi, `about` that many.

    >>> ticks(0, 95)
    [0.0, 20.0, 40.0, 60.0, 80.0]
    """
    if not hi > lo:
        return [lo]
    raw = (hi - lo) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= raw * 0.999)
    first = math.ceil(lo / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(hi / step + 1e-9) + 1)]


def labels(steps: Sequence[float]) -> list[str]:
    """Ticks in figures, all with as many decimals as the one that takes most.

    >>> labels([0.0, 0.25, 0.5]), labels([3.0, 4.0])
    (['0.00', '0.25', '0.50'], ['3', '4'])
    """
    digits = [f"{t:.12f}".rstrip("0").partition(".")[2] for t in steps]
    most = max(map(len, digits), default=0)
    return [f"{t + 0.0:.{most}f}" for t in steps]  # of -0.0, 0


def text_at(x: float, y: float, text: str, class_: str = "", anchor: str = "start") -> Markup:
    return tag("text", text, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor)


def turned(x: float, y: float, text: str) -> Markup:
    """The name of a vertical axis, read upwards."""
    return tag("text", text, x=x, y=y, class_="axis-word", text_anchor="middle", transform=f"rotate(-90 {x:.0f} {y:.0f})")


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def box(x: float, y: float, w: float, h: float, class_: str, tip: str | None = None, **more: object) -> Markup:
    return tag("rect", x=x, y=y, width=max(w, 0.0), height=max(h, 0.0), class_=class_, data_tip=tip, **more)


def wide(text: str, per: float = 6.4) -> float:
    """About how many pixels a text takes in the charts' 12 px type.

    >>> wide("q_proj")
    38.4
    """
    return per * len(text)


def apart(wanted: Sequence[float], gap: float, lo: float, hi: float) -> list[float]:
    """The heights nearest to the wanted ones that keep labels `gap` apart, between lo and hi.

    >>> apart([10.0, 11.0, 40.0], gap=12, lo=0, hi=100)
    [10.0, 22.0, 40.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: dict[int, float] = {}
    edge = lo - gap
    for i in order:
        edge = max(wanted[i], edge + gap)
        placed[i] = edge
    edge = hi + gap
    for i in reversed(order):
        edge = min(placed[i], edge - gap)
        placed[i] = edge
    return [placed[i] for i in range(len(wanted))]


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: pieces (name, value, class) from zero on, and what is written behind its end.

    >>> Bar("training", [("weights", 300.0, "s0"), ("adapters", 20.0, "s1")]).total
    320.0
    """

    label: str
    pieces: Sequence[tuple[str, float, str]]
    end: str = ""
    group: str = ""

    @property
    def total(self) -> float:
        return sum(v for _, v, _ in self.pieces)


def bars(title: str, rows: Sequence[Bar], show: Show, axis: str, limit: tuple[str, float] | None = None, width: float = 1080) -> Markup:
    """Horizontal stacked bars from zero with an axis in round numbers and, where given, a limit line over all of them."""
    stacked = width < STACKED
    left = 2.0 if stacked else 14 + max((wide(r.label) for r in rows), default=0)
    right = 20.0 if stacked else 20 + max((wide(r.end) for r in rows), default=0)
    over = 16.0 if stacked else 0.0  # of a bar, for its label
    top, pitch, thick = (28 if limit else 8), 27 + over, 19
    most = max([r.total for r in rows] + ([limit[1]] if limit else []) + [1e-12])
    x = lambda v: left + (width - left - right) * v / most  # noqa: E731
    marks: list[Markup] = []
    y, group, ys = float(top), None, []
    for r in rows:
        if r.group != group and group is not None:
            y += 9
        group = r.group
        ys.append(y + over)
        y += pitch
    bottom = y
    for t in ticks(0, most, 3 if stacked else 6):
        marks += [line(x(t), top - 4, x(t), bottom, "grid"), text_at(x(t), bottom + 15, show(t), "tick", "middle" if t else "start")]
    for r, y in zip(rows, ys, strict=True):
        marks.append(text_at(left, y - 5, r.label, "label") if stacked else text_at(left - 8, y + 14, r.label, "label", "end"))
        done = 0.0
        for name, v, class_ in r.pieces:
            a, b = x(done), x(done + v)
            marks.append(box(a, y, max(b - a - 1, min(b - a, 0.8)), thick, class_, f"{r.label}: {name}\n{show(v)}"))
            if name and b - a > wide(name) + 8:
                marks.append(text_at((a + b) / 2, y + 13.5, name, "on", "middle"))
            done += v
    marks.append(line(left, top - 4, left, bottom, "axis"))
    if limit:
        at = x(limit[1])
        side = "end" if at + wide(limit[0]) / 2 > width else "middle"
        marks += [line(at, top - 8, at, bottom, "limit"), text_at(width if side == "end" else at, top - 13, limit[0], "limit-word", side)]
    ends = [(r, y) for r, y in zip(rows, ys, strict=True) if r.end]
    if stacked:
        marks += [text_at(width - 2, y - 5, r.end, "value", "end") for r, y in ends]
    else:
        marks += [text_at(x(r.total) + 7, y + 14, r.end, "value") for r, y in ends]
    marks.append(text_at(left + (width - left - right) / 2, bottom + 33, axis, "axis-word", "middle"))
    return drawing(width, bottom + 40, title, *marks)


@dataclass(frozen=True)
class Cell:
    """One square of a heat map; `index` is what the page looks up on hover."""

    row: str
    column: str
    class_: str
    word: str
    index: int


def grid(title: str, cells: Sequence[Cell], rows: Sequence[str], columns: Sequence[str], axis: str, width: float = 1080) -> Markup:
    """A heat map with its value written into every cell that has room for it. On a narrow drawing rows and columns change places."""
    if width < STACKED:
        return _tall(title, cells, rows, columns, axis, width)
    left = 12 + max((wide(r) for r in rows), default=0)
    w = min((width - left - 4) / max(len(columns), 1), 46)
    h = 26.0
    xs = {c: left + i * w for i, c in enumerate(columns)}
    ys = {r: 4 + i * h for i, r in enumerate(rows)}
    bottom = 4 + h * len(rows)
    every = max(1, math.ceil(wide("00") / w))
    marks = [text_at(left - 8, y + 17, r, "label", "end") for r, y in ys.items()]
    marks += [text_at(xs[c] + w / 2, bottom + 15, c, "tick", "middle") for i, c in enumerate(columns) if i % every == 0]
    marks += _squares(cells, lambda c: (xs[c.column], ys[c.row]), w, h)
    used = left + w * len(columns)
    marks.append(text_at((left + used) / 2, bottom + 33, axis, "axis-word", "middle"))
    return drawing(width if used > width * 0.7 else used + 8, bottom + 40, title, *marks)


def _tall(title: str, cells: Sequence[Cell], rows: Sequence[str], columns: Sequence[str], axis: str, width: float) -> Markup:
    """The heat map with its columns downwards; what all rows' names begin with is left out above them."""
    names = {r: r.rpartition(".")[2] if len({k.rpartition(".")[2] for k in rows}) == len(rows) else r for r in rows}
    left, top = 40.0, 10 + max((wide(n) for n in names.values()), default=0)
    w, h = min((width - left) / max(len(rows), 1), 46), 19.0
    w = math.floor(w) if w > 8 else w
    xs = {r: left + i * w for i, r in enumerate(rows)}
    ys = {c: top + i * h for i, c in enumerate(columns)}
    marks = [
        tag("text", n, x=0, y=0, class_="label", transform=f"translate({xs[r] + w / 2 + 4:.1f} {top - 6:.1f}) rotate(-90)")
        for r, n in names.items()
    ]
    marks += [text_at(left - 7, y + 13.5, c, "tick", "end") for c, y in ys.items()]
    marks += _squares(cells, lambda c: (xs[c.row], ys[c.column]), w, h)
    marks.append(turned(11, top + h * len(columns) / 2, axis))
    return drawing(width, top + h * len(columns) + 4, title, *marks)


def _squares(cells: Sequence[Cell], at: Callable[[Cell], Point], w: float, h: float) -> list[Markup]:
    """The squares of a heat map, those of one class together."""
    marks = []
    for class_ in dict.fromkeys(c.class_ for c in cells):
        alike = [(c, *at(c)) for c in cells if c.class_ == class_]
        squares = [tag("rect", x=x, y=y, data_m=c.index) for c, x, y in alike]
        lines: dict[tuple[float, str], list[tuple[float, str]]] = {}  # letters of a line have places of their own
        for c, x, y in alike:
            if w >= wide(c.word) + 3:
                lines.setdefault((y, "" if len(c.word) == 1 else c.column + c.row), []).append((x + (w - 1.5) / 2, c.word))
        inside = [
            tag("text", "".join(word for _, word in put), x=" ".join(f"{x:.0f}" for x, _ in put), y=y + (h + 7) / 2)
            for (y, _), put in lines.items()
        ]
        marks.append(tag("g", *squares, *inside, class_=f"cells {class_}", style=f"--w:{w - 1.5:.1f}px;--h:{h - 1.5:.1f}px"))
    return marks


@dataclass(frozen=True)
class Curve:
    """A line with its raw points; `dots` are separate measurements on the same axes, `spikes` raw points to point at, `spans` intervals
    (x, low, high)."""

    name: str
    class_: str
    raw: Sequence[Point]
    smooth: Sequence[Point]
    dots: Sequence[Point] = ()
    spikes: Sequence[Point] = ()
    spans: Sequence[tuple[float, float, float]] = ()


def curves(
    title: str,
    series: Sequence[Curve],
    x_axis: str,
    y_axis: str,
    width: float = 1080,
    height: float = 340,
    band: tuple[str, float, float] | None = None,
) -> Markup:
    """Raw points faint, smoothed lines strong, each named at its end; hovering a step lists all series there. `band` is where the lines are
    expected to begin."""
    points = [p for s in series for p in (*s.raw, *s.dots, *((a, v) for a, *span in s.spans for v in span))]
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    x0, y0, y1 = (x0, y0, y1) if band is None else (min(x0, 0.0), min(y0, band[1]), max(y1, band[2]))
    pad = 0.06 * (y1 - y0) or 0.5
    y0, y1 = y0 - pad, y1 + pad
    left, top, bottom = 58.0, 10.0, height - 46
    stacked = width < STACKED
    right = 12.0 if stacked else 20 + max(wide(s.name, 7) for s in series)
    x = lambda v: left + (width - left - right) * ((v - x0) / (x1 - x0) if x1 > x0 else 0.5)  # noqa: E731
    y = lambda v: bottom - (bottom - top) * (v - y0) / (y1 - y0)  # noqa: E731
    steps = ticks(y0, y1, 5)
    marks = []
    for t, word in zip(steps, labels(steps), strict=True):
        marks += [line(left, y(t), width - right, y(t), "grid"), text_at(left - 8, y(t) + 4, word, "tick", "end")]
    for t in ticks(x0, x1, 4 if stacked else 8):
        if t == int(t):
            marks += [line(x(t), bottom, x(t), bottom + 4, "axis"), text_at(x(t), bottom + 18, f"{int(t):,}", "tick", "middle")]
    marks.append(line(left, bottom, width - right, bottom, "axis"))
    path = lambda ps: "".join(f"{'L' if i else 'M'}{x(a):.1f} {y(b):.1f}" for i, (a, b) in enumerate(ps))  # noqa: E731
    upright = lambda spans: "".join(f"M{x(a):.1f} {y(lo):.1f}V{y(hi):.1f}" for a, lo, hi in spans)  # noqa: E731
    marks += [tag("path", d=upright(s.spans), class_=f"raw {s.class_}") for s in series if s.spans]
    marks += [tag("path", d=path(s.raw), class_=f"raw {s.class_}") for s in series]
    marks += [tag("path", d=path(s.smooth), class_=f"smooth {s.class_}") for s in series]
    for s in series:  # round ends of lines without a length
        put = "".join(f"M{x(a):.1f} {y(b):.1f}h0" for a, b in s.dots)
        marks += [tag("path", d=put, class_=f"rings {s.class_}"), tag("path", d=put, class_="cores")] if put else []
    for s in series:
        for a, b in s.spikes:
            tip = f"M{x(a) - 4.5:.1f} {y(b) - 12:.1f}h9l-4.5 7z"
            marks.append(tag("path", d=tip, class_=f"spike {s.class_}"))
    if band is not None:
        name, lo, hi = band
        marks.append(box(x(0.0) - 3, y(hi), 6, max(y(lo) - y(hi), 2.0), "band", f"{name}\n{lo:.3f} to {hi:.3f}"))
        marks.append(text_at(x(0.0) + 8, max(y(hi) - 3, top + 8), name, "at-word"))
    ends = [s.smooth[-1] if s.smooth else s.dots[-1] for s in series]
    heights = [top + 12 + 17 * i for i in range(len(ends))] if stacked else apart([y(e[1]) for e in ends], 17, top + 8, bottom - 4)
    for s, (a, _), at in zip(series, ends, heights, strict=True):  # losses fall: the upper right corner is free
        marks.append(text_at(width - right if stacked else x(a) + 8, at + 4, s.name, f"name {s.class_}", "end" if stacked else "start"))
    at_step: dict[float, list[str]] = {}
    for s in series:
        smooth = dict(s.smooth)
        for a, b in s.raw:
            at_step.setdefault(a, []).append(f"{s.name}  {b:.4f}  ({smooth[a]:.4f})")
        for a, b in s.dots:
            at_step.setdefault(a, []).append(f"{s.name}  evaluation {b:.4f}")
    where, hits = sorted(at_step), []
    for i, a in enumerate(() if stacked else where):  # too narrow to hit a step
        from_ = x((where[i - 1] + a) / 2) if i else x(a)
        to = x((where[i + 1] + a) / 2) if i + 1 < len(where) else x(a)
        hits.append(tag("rect", x=from_, width=max(to - from_, 3.0), data_tip=f"step {a:g}\n" + "\n".join(at_step[a])))
    marks += [tag("g", *hits, class_="hits", style=f"--y:{top:.0f}px;--h:{bottom - top:.0f}px")] if hits else []
    marks.append(text_at(left + (width - left - right) / 2, height - 8, x_axis, "axis-word", "middle"))
    marks.append(turned(14, (top + bottom) / 2, y_axis))
    return drawing(width, height, title, *marks)


@dataclass(frozen=True)
class Dot:
    """A value with its interval."""

    label: str
    value: float
    low: float | None
    high: float | None
    class_: str
    shown: str


def dots(title: str, rows: Sequence[Dot], axis: str, zero: bool, width: float = 520) -> Markup:
    """Values with intervals on one axis. With `zero` the axis starts there; otherwise it covers the intervals."""
    stacked = width < STACKED
    left = 10.0 if stacked else 20 + max(wide(r.label) for r in rows)
    right, top, pitch = 18.0, 8.0, 44.0 if stacked else 30.0
    ends = [v for r in rows for v in (r.value, r.low, r.high) if v is not None]
    lo, hi = (min(0.0, *ends) if zero else min(ends)), max(ends)
    pad = 0.06 * (hi - lo) or abs(hi) * 0.1 or 1.0
    lo, hi = (lo if zero else lo - pad), hi + pad
    x = lambda v: left + (width - left - right) * (v - lo) / (hi - lo)  # noqa: E731
    bottom = top + pitch * len(rows)
    steps = ticks(lo, hi, 5)
    marks = []
    for t, word in zip(steps, labels(steps), strict=True):
        marks += [line(x(t), top, x(t), bottom, "grid"), text_at(x(t), bottom + 15, word, "tick", "middle")]
    for i, r in enumerate(rows):
        y = top + pitch * (i + (0.72 if stacked else 0.5))
        tip = f"{r.label}\n{r.shown}"
        marks.append(text_at(left, y - 12, r.label, "label") if stacked else text_at(left - 16, y + 4, r.label, "label", "end"))
        marks.append(line(left, y, width - right, y, "rule"))
        if r.low is not None and r.high is not None:
            marks.append(line(x(r.low), y, x(r.high), y, f"interval {r.class_}"))
            marks += [line(x(v), y - 4, x(v), y + 4, f"interval {r.class_}") for v in (r.low, r.high)]
        marks.append(tag("circle", cx=x(r.value), cy=y, r=5, class_=f"dot {r.class_}"))
        marks.append(box(left, top + pitch * i, width - left - right, pitch, "hit", tip))
    marks.append(line(left, bottom, width - right, bottom, "axis"))
    marks.append(text_at(left + (width - left - right) / 2, bottom + 33, axis, "axis-word", "middle"))
    return drawing(width, bottom + 40, title, *marks)


def histogram(
    title: str,
    edges: Sequence[float],
    counts: Sequence[int],
    marked: Mapping[str, float],
    axis: str,
    width: float = 520,
    height: float = 240,
) -> Markup:
    """Counts in bins of equal width on paper; edges[i] to edges[i + 1] is bin i. `marked` values are lines at their place."""
    left, right, top, bottom = 54.0, 14.0, 20.0 + 16 * len(marked), height - 46
    w = (width - left - right) / max(len(counts), 1)
    most = max([*counts, 1])

    def x(v: float) -> float:
        for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
            if v <= b:
                return left + w * (i + (max(v, a) - a) / ((b - a) or 1))
        return left + w * len(counts)

    y = lambda v: bottom - (bottom - top) * v / most  # noqa: E731
    marks = []
    for t in ticks(0, most, 4):
        if t == int(t):
            marks += [line(left, y(t), width - right, y(t), "grid"), text_at(left - 8, y(t) + 4, f"{int(t):,}", "tick", "end")]
    every = max(1, math.ceil((wide(f"{int(max(edges)):,}") + 8) / w))
    for i, n in enumerate(counts):
        tip = f"over {edges[i]:,.0f} up to {edges[i + 1]:,.0f} tokens\n{n:,} rows"
        marks.append(box(left + i * w + 1, y(n), w - 2, bottom - y(n), "s0 fill", tip))
    marks += [text_at(left + i * w, bottom + 15, f"{e:,.0f}", "tick", "middle") for i, e in enumerate(edges) if i % every == 0]
    for k, (name, v) in enumerate(marked.items()):
        at = x(v)
        late = at > width - right - wide(name) - 8
        marks.append(line(at, 8 + 16 * k, at, bottom, "at"))
        marks.append(text_at(at - 5 if late else at + 5, 18 + 16 * k, name, "at-word", "end" if late else "start"))
    marks.append(line(left, bottom, width - right, bottom, "axis"))
    marks.append(text_at(left + (width - left - right) / 2, height - 8, axis, "axis-word", "middle"))
    marks.append(turned(13, (top + bottom) / 2, "rows"))
    return drawing(width, height, title, *marks)


@dataclass(frozen=True)
class Mark:
    """A point of a plane: x, y, a class, what is written beside it (nothing: hover alone), and what hovering says."""

    x: float
    y: float
    class_: str
    word: str
    tip: str
    ring: bool = False


def front(
    title: str,
    lines_: Sequence[tuple[str, Sequence[Point]]],
    marks_: Sequence[Mark],
    x_axis: str,
    y_axis: str,
    limit: tuple[str, float] | None,
    show: Show,
    width: float = 1080,
    height: float = 360,
) -> Markup:
    """Falling curves, each in its class, with single points about them; y is logarithmic where all of it is positive. The limit is a line from
    top to bottom."""
    points = [p for _, line_ in lines_ for p in line_]
    xs = [p[0] for p in points] + [m.x for m in marks_] + ([limit[1]] if limit else [])
    ys = [p[1] for p in points] + [m.y for m in marks_]
    log = min(ys) > 0 and max(ys) > 3 * min(ys)
    up = (lambda v: math.log10(v)) if log else (lambda v: v)  # noqa: E731
    x0, x1, y0, y1 = min(xs), max(xs), up(min(ys)), up(max(ys))
    x0, x1 = x0 - 0.03 * (x1 - x0 or 1), x1 + 0.03 * (x1 - x0 or 1)
    y0, y1 = y0 - 0.07 * (y1 - y0 or 1), y1 + 0.07 * (y1 - y0 or 1)
    left, right, top, bottom = (58.0 if width < STACKED else 70.0), 24.0, 28.0, height - 46
    x = lambda v: left + (width - left - right) * (v - x0) / (x1 - x0)  # noqa: E731
    y = lambda v: bottom - (bottom - top) * (up(v) - y0) / (y1 - y0)  # noqa: E731
    marks = []
    for v in decades(10**y0, 10**y1) if log else ticks(y0, y1, 5):
        marks += [line(left, y(v), width - right, y(v), "grid"), text_at(left - 8, y(v) + 4, f"{v:g}", "tick", "end")]
    for v in ticks(x0, x1, 3 if width < STACKED else 8):
        marks += [line(x(v), bottom, x(v), bottom + 4, "axis"), text_at(x(v), bottom + 18, show(v), "tick", "middle")]
    marks.append(line(left, bottom, width - right, bottom, "axis"))
    if limit:
        side = "end" if x(limit[1]) + wide(limit[0]) / 2 > width else "middle"
        marks.append(line(x(limit[1]), top - 8, x(limit[1]), bottom, "limit"))
        marks.append(text_at(width if side == "end" else x(limit[1]), top - 13, limit[0], "limit-word", side))
    for class_, line_ in lines_:
        path = "".join(f"{'L' if i else 'M'}{x(a):.1f} {y(b):.1f}" for i, (a, b) in enumerate(line_))
        marks.append(tag("path", d=path, class_=f"smooth {class_}"))
    used: list[tuple[float, float, float, float]] = []
    for m in sorted(marks_, key=lambda m: (bool(m.word), not m.ring)):  # the ring's name has the first choice of a place
        a, b = x(m.x), y(m.y)
        if m.ring:
            marks.append(tag("circle", cx=a, cy=b, r=9.5, class_=f"dot hollow {m.class_}"))
        marks.append(tag("circle", cx=a, cy=b, r=4.5 if m.word or m.ring else 2.8, class_=f"dot {m.class_}", data_tip=m.tip))
        if m.word:
            w = wide(m.word, 7)
            places = [(a + 13 if right_ else a - 13 - w, b + dy) for dy in (-9, 20, -26, 37, -43) for right_ in (True, False)]
            inside = [p for p in places if left <= p[0] and p[0] + w <= width - right + 12 and top < p[1] < bottom - 2] or places[:1]
            free = [p for p in inside if all(p[0] + w < lo or hi < p[0] or p[1] < t or u < p[1] - 12 for lo, t, hi, u in used)] or inside
            at = free[0]
            used.append((at[0], at[1] - 12, at[0] + w, at[1]))
            marks.append(text_at(*at, m.word, f"name {m.class_}"))
    marks.append(text_at(left + (width - left - right) / 2, height - 8, x_axis, "axis-word", "middle"))
    marks.append(turned(13, (top + bottom) / 2, y_axis))
    return drawing(width, height, title, *marks)


def decades(lo: float, hi: float) -> list[float]:
    """1, 2 and 5 times powers of ten between lo and hi; powers alone where there are many.

    >>> decades(0.5, 30)
    [0.5, 1.0, 2.0, 5.0, 10.0, 20.0]
    """
    powers = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    values = [f * 10.0**p for p in powers for f in (1, 2, 5) if lo <= f * 10.0**p <= hi]
    return values if len(values) <= 9 else [v for v in values if f"{v:e}"[0] == "1"]
