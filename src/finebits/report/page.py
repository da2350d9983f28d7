"""One self-contained page for a plan or a run: inline style, drawings and script, nothing fetched, every text escaped.

A panel whose file is missing is left out. What a stranger wrote (samples, data, recipe) only ever appears as text: the template escapes,
and the page's own content security policy forbids every request.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from finebits import registry
from finebits.plan.base import Plan
from finebits.report import svg, tables
from finebits.report.tables import Column, Table, count, number, percent, signed, size
from finebits.report.text import kl_line, solver_line

Json = Mapping[str, Any]
POINTS = 160  # a longer loss curve is drawn as means over neighbouring steps
SAMPLES, PREVIEWS, LONGEST = 12, 6, 3000  # rows shown, characters of one text
COLOURS = 6  # line colours of the style sheet
TERMS = 12  # colours for stacked pieces
SHADES = ("b16", "b4", "b2", "b8", "b3")  # of what was chosen, the most frequent first
CHARTS = (  # of the evaluation: key, axis, how a value is shown, its scale on the axis, whether the axis starts at zero
    ("loss", "held-out loss (nats per trained token)", number, 1, False),
    ("kl", "KL to full precision (nats per trained token)", number, 1, True),
    ("top1", "top-1 agreement with full precision (%)", percent, 100, False),
    ("gap_closed", "gap between untuned and 16-bit LoRA closed (%)", percent, 100, True),
)


@dataclass(frozen=True)
class Tile:
    """One figure of the headline; `tone` is "good", "bad" or nothing."""

    label: str
    value: str
    below: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Block:
    """A chart with its tables, or text of one kind; the template decides by what is there."""

    chart: Markup | None = None
    head: str = ""
    note: str = ""
    key: Sequence[tuple[str, str, str]] = ()
    tables: Sequence[Table] = ()
    open: bool = False
    half: bool = False
    samples: Sequence[Json] = ()
    preview: Sequence[Json] = ()
    problems: Sequence[Json] = ()
    facts: Sequence[tuple[str, str]] = ()
    code: str = ""
    cited: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """A numbered part of the page."""

    name: str
    title: str
    blocks: Sequence[Block]
    lead: str = ""


@dataclass(frozen=True)
class Live:
    """What the page needs when a server stands behind it: the state of its controls as JSON, the lengths to choose from, and how long the
    solve took."""

    state: str
    lengths: Sequence[int]
    length: int
    pulled: bool
    milliseconds: float


@dataclass(frozen=True)
class Folder:
    """A run folder as it was read. None or empty where a file is missing."""

    plan: Plan
    name: str = ""
    recipe: str = ""
    data: Json | None = None
    memory: dict[str, Json] = field(default_factory=dict)
    events: dict[str, list[Json]] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    evaluation: Json | None = None
    samples: Sequence[Json] = ()
    export: Json | None = None
    choices: dict[str, Json] = field(default_factory=dict)
    refined: dict[str, Json] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The run that followed the plan: the one named as the plan's start, or else the first."""
        starts = Counter(registry.to_json(s.init)["paper"] for s in self.plan.modules.values() if s.adapter is not None)
        ran = [*self.memory, *self.events]
        return next((name for name, _ in starts.most_common() if name in ran), ran[0] if ran else "")

    @property
    def runs(self) -> list[str]:
        """All runs, the main one first."""
        names = sorted({*self.memory, *self.events})
        return sorted(names, key=lambda n: n != self.main)


def plan_page(plan: Plan, live: Live | None = None) -> str:
    """The page of a plan before anything has run: budget, memory by term, alternatives, bits, solver, references. With `live` it has a
    slider for the budget, and asks the server that it came from to solve again."""
    return _render(Folder(plan), live)


def run_page(folder: Path) -> str:
    """The page of a run folder. Only plan.json must be there; raises ValueError naming the file that cannot be read."""
    return _render(read(Path(folder)))


def read(folder: Path) -> Folder:
    """Everything that a page shows, from the files of a run folder."""
    plan = Plan.load(folder / "plan.json")
    memory, events, unfinished = {}, {}, []
    chosen, refined = {}, {}
    for run in sorted((folder / "runs").glob("*/")):
        held = _json(run / "memory.json")
        if held is not None:
            memory[run.name] = held
        for file, found in (("choices.json", chosen), ("refined.json", refined)):
            told = _json(run / file)
            if told:
                found[run.name] = told
        if (run / "events.jsonl").exists():
            events[run.name], cut = _events(run / "events.jsonl")
            unfinished += [run.name] if cut else []
    recipe = folder / "recipe.yaml"
    return Folder(
        plan,
        folder.resolve().name,
        recipe.read_text() if recipe.exists() else "",
        _json(folder / "data.json"),
        memory,
        events,
        unfinished,
        _json(folder / "evaluation.json"),
        _json(folder / "samples.json") or (),
        _json(folder / "export.json"),
        chosen,
        refined,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON (line {e.lineno}): {e.msg}. Delete it to get the page without its panel.") from None


def _events(path: Path) -> tuple[list[Json], bool]:
    """The events, and whether the last line was cut off (a run that was killed, or is still writing)."""
    events: list[Json] = []
    lines = path.read_text().splitlines(keepends=True)
    for i, line in enumerate(lines):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as e:
            if i == len(lines) - 1 and not line.endswith("\n"):
                return events, True
            raise ValueError(f"{path}, line {i + 1}, is not JSON: {e.msg}. One event a line is wanted.") from None
    return events, False


# --- panels -------------------------------------------------------------------------------------------------------------------------


def _render(run: Folder, live: Live | None = None) -> str:
    made = (_memory, _choice, _bits, _start, _losses, _evaluation, _samples, _export, _data, _reproduce)
    panels = [p for p in (make(run) for make in made) if p is not None]
    return _template().render(
        title=_title(run.plan.model),
        name=run.name,
        hash=run.plan.hash,
        tiles=_tiles(run),
        panels=panels,
        menu=Markup(json.dumps(_menu(run.plan), separators=(",", ":")).replace("<", r"\u003c")),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js") + (_file("live.js") if live else "")),
        live=live,
    )


def _title(model: str) -> str:
    """A hub id as it is, a path by its last part."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model or "unnamed model"


@cache
def _file(name: str) -> str:
    return resources.files("finebits.report").joinpath(name).read_text()


@cache
def _template() -> Any:
    room = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    room.filters["cells"] = _cells
    return room.from_string(_file("page.html"))


def _cells(table: Table) -> list[tuple[bool, list[tuple[str, str | None]]]]:
    """Rows as (is a sum, [(shown, raw value for sorting and CSV)])."""
    rows = []
    for i, (shown, raw) in enumerate(zip(table.shown(), table.rows, strict=True)):
        held = [None if isinstance(v, str) else "" if v is None else _raw(v) for v in raw]
        rows.append((i in table.strong, [(s, None if s == r else r) for s, r in zip(shown, held, strict=True)]))
    return rows


def _raw(v: Any) -> str:
    return "|".join("" if x is None else f"{x:.6g}" if isinstance(x, float) else str(x) for x in (v if isinstance(v, tuple) else (v,)))


def _tiles(run: Folder) -> list[Tile]:
    plan, tiles = run.plan, []
    if plan.budget is not None:
        tiles.append(Tile("memory budget", size(plan.budget), tables.stated(plan).partition(", ")[2] or "for every phase"))
    memory = run.memory.get(run.main)
    measured = memory.get("measured_peak") if memory else None
    if measured is not None:
        planned = sum(memory["planned"].values()) if memory else 0
        over = plan.budget is not None and measured > plan.budget
        said = f"planned {size(planned)}, {signed(tables.deviation(planned, measured))}"
        tiles.append(
            Tile("training peak, measured", size(measured), said + (", over the budget" if over else ""), "bad" if over else "good")
        )
    elif plan.memory:
        over = plan.budget is not None and plan.peak > plan.budget
        share = f"{percent(plan.peak / plan.budget)} of the budget" if plan.budget else ""
        tiles.append(Tile("training peak, planned", size(plan.peak), share, "bad" if over else ""))
    found = tables.matrices(plan)
    average = tables.average_bits(found)
    chosen = len({m.format for m in found})
    below = f"{len(found)} matrices in {chosen} format{'' if chosen == 1 else 's'}"
    tiles.append(Tile("bits per linear weight", tables.bits(average), below))
    loss = _before_after(run)
    if loss:
        tiles.append(loss)
    if run.export:
        verdicts = [t.get("verdict") or "not verified" for t in run.export["targets"]]
        failed, checked = "fail" in verdicts, "not verified" not in verdicts
        said = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        verdict = "failed" if failed else "passed" if checked else "not done"
        tiles.append(Tile("export verification", verdict, said, "bad" if failed else "good" if checked else ""))
    return tiles


def _before_after(run: Folder) -> Tile | None:
    entries = {e["key"]: e for e in (run.evaluation or {}).get("entries", ())}
    before = entries.get("full") or next((e for e in entries.values() if e["stage"] == "start"), None)
    after = entries.get(run.main) or next((e for e in entries.values() if e["stage"] == "tuned"), None)
    if before is None or after is None or before.get("loss") is None or after.get("loss") is None:
        return None
    value = f"{number(before['loss'], 3)} → {number(after['loss'], 3)}"
    return Tile("held-out loss", value, f"{before['name']} → {after['name']}", "good" if after["loss"] < before["loss"] else "bad")


def _memory(run: Folder) -> Panel | None:
    plan = run.plan
    of_runs = [(name, run.memory[name]) for name in run.runs if name in run.memory]
    if not of_runs and not plan.memory:
        return None
    order = list(dict.fromkeys(term for held in [plan.memory, *(m["planned"] for _, m in of_runs)] for term, v in held.items() if v))
    colour = {term: f"t{i % TERMS}" for i, term in enumerate(order)}
    largest = max([plan.budget or 0, plan.peak, *(m.get("measured_peak") or 0 for _, m in of_runs)])
    unit, step = tables.unit(largest)
    show = lambda v: f"{v:,.{0 if largest >= 10 * step else 1}f} {unit}"  # noqa: E731
    rows, below = [], []
    for name, held in of_runs:
        planned = sum(held["planned"].values())
        pieces = [(term, v / step, f"{colour[term]} fill") for term, v in held["planned"].items() if v]
        rows.append(svg.Bar(f"{name} planned", pieces, size(planned), name))
        measured = held.get("measured_peak")
        if measured is not None:
            said = f"{size(measured)}  {signed(tables.deviation(planned, measured))}"
            rows.append(svg.Bar("measured", [("training peak", measured / step, "measured")], said, name))
        below.append(replace(tables.memory_table(held), name=f"memory of {name}"))
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
            off = tables.deviation(row["planned"], row["measured"])
            said = size(row["measured"]) + (f"  {signed(off)}" if off is not None else "")
            label = "measured" if row["planned"] is not None else f"{row['phase']} measured"
            rows.append(svg.Bar(label, [("peak", row["measured"] / step, "measured")], said, row["phase"]))
    limit = None if plan.budget is None else (f"budget {size(plan.budget)}", plan.budget / step)
    chart = svg.bars("Memory planned and measured", rows, show, "peak memory", limit)
    terms = main["planned"] if main else plan.memory
    key = [(colour[t], t, size(v)) for t, v in terms.items() if v]
    notes = [f"{size(held)} of {term} stay in host memory, beside the budget." for term, held in plan.host.items()]
    if plan.budget is not None:
        beyond = [f"{row['phase']} by {size(row['measured'] - plan.budget)}" for row in phases if (row["measured"] or 0) > plan.budget]
        notes += [f"Beyond the budget: {', '.join(beyond)}."] if beyond else []
    if main:
        base = f" ({size(main['baseline'])})" if main.get("baseline") is not None else ""
        notes.append(f"Peaks are above the process before the model loads{base}.")
        stored = main.get("stored")
        if stored:
            same = stored["planned"] == stored["measured"]
            said = "equal to the plan to the byte" if same else f"{stored['measured'] - stored['planned']:+,} bytes against the plan"
            notes.append(f"Stored weights: {size(stored['measured'])}, {said}.")
        if main.get("settings"):
            notes.append("Measured under " + ", ".join(f"{k}={v}" for k, v in main["settings"].items()) + ".")
    title = "Memory, planned and measured" if of_runs else "Memory, planned"
    return Panel("memory", title, [Block(chart, note=" ".join(notes), key=key, tables=below)])


def _planned_table(plan: Plan) -> Table:
    rows: list[tuple[Any, ...]] = [(k, v, v / plan.peak if plan.peak else None) for k, v in plan.memory.items()]
    rows.append(("training peak", plan.peak, None))
    strong = frozenset({len(rows) - 1})
    rows += [(f"{k} peak", v, None) for k, v in plan.rows.items()]
    return Table("memory", (Column("term"), Column("planned", size), Column("share", percent)), rows, strong)


def _choice(run: Folder) -> Panel | None:
    plan = run.plan
    table = tables.alternatives_table(plan)
    if table is None:
        return None
    rows, points = plan.solver["alternatives"], plan.solver.get("pareto") or []
    blocks, word = [], tables.loss_word(plan)
    if len(points) > 1:
        unit, step = tables.unit(max(plan.budget or 0, *(p["peak"] for p in points)))
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
        chart = svg.front("Memory against expected loss", line, marks, "training peak", word, limit, show)
        curve = Table("pareto", (Column("training peak", size), Column(word, tables.figures)), [(p["peak"], p["loss"]) for p in points])
        note = "The line is the best mixed plan of every budget, with the levers of the chosen one."
        blocks.append(Block(chart, tables=[curve], note=note + (" Open circles: levers as asked." if pulled else "")))
    blocks.append(Block(head="Alternatives", tables=[table], open=True))
    rest = tables.buys_table(plan)
    if rest is not None:
        note = f"The job takes {size(plan.need)} of {size(plan.budget)}. Each line alone, with what the whole job would take then."
        blocks.append(Block(head="What the rest could buy", note=note, tables=[rest], open=True))
    kind = "measured on the weights" if plan.solver.get("measured") else "of normal data: the weights were not read"
    nats = plan.solver.get("objective") in ("fisher", "kl")
    what = "second-order estimates of the KL in nats a trained token" if nats else "relative errors"
    lead = f"Expected {word}: the sum of the matrices' {what} before training, {kind}. Lower is better; fine-tuning mends part of it."
    return Panel("choice", "What fits", blocks, lead)


def _shade(code: float) -> str:
    """The colour class of a code width."""
    return next(f"b{b}" for b in (2, 3, 4, 8, 16) if code <= b or b == 16)


def _bits(run: Folder) -> Panel | None:
    found = tables.matrices(run.plan)
    if not found:
        return None
    layers = sorted({m.layer for m in found if m.layer is not None})
    outside = any(m.layer is None for m in found)
    columns = [str(n) for n in layers] + (["–"] if outside else [])
    kinds = list(dict.fromkeys(m.kind for m in found))
    cells = [svg.Cell(m.kind, "–" if m.layer is None else str(m.layer), _shade(m.code), str(m.code), i) for i, m in enumerate(found)]
    axis = "layer" + (" (– stands outside the layers)" if outside else "")
    heat = svg.grid("Bits of every matrix", cells, kinds, columns, axis)
    formats = tables.formats_table(run.plan)
    code = {m.format: m.code for m in found}
    rows = [
        svg.Bar(name, [("", n, f"{_shade(code[name])} fill")], f"{n:,}" + (f"  ·  {b:.2f} bits a weight" if b is not None else ""))
        for name, n, _, _, b in formats.rows
    ]
    bars = svg.bars("Matrices in every format", rows, lambda v: f"{v:,.0f}", "matrices", width=520)
    protected = tables.most_protected(found)
    facts = [("Most protected", "; ".join(protected))] if protected else []
    if run.plan.solver:
        facts.append(("Solver", solver_line(run.plan.solver)))
    if run.plan.solver.get("kl"):
        facts.append(("Predicted", kl_line(run.plan.solver["kl"])))
    facts += [("Notice", notice) for notice in run.plan.levers.get("notices", ())] + list(tables.levers(run.plan).items())
    lead = "The number in a cell is the width of one code in bits; scales come on top. Hover for size, loss and the other options."
    blocks = [
        Block(heat, tables=[tables.matrices_table(run.plan)]),
        Block(bars, head="Formats", tables=[formats], half=True),
        Block(head="Solver and levers", facts=facts, half=True),
    ]
    return Panel("bits", "Bits per matrix", blocks, lead)


def _start(run: Folder) -> Panel | None:
    """What was chosen among starts, and what refinements of them did."""
    blocks = [b for name, held in run.choices.items() for b in _chosen(run, name, held)]
    blocks += [_refined(name, held) for name, held in run.refined.items()]
    return Panel("start", "How the adapters start", blocks) if blocks else None


def _chosen(run: Folder, name: str, held: Json) -> list[Block]:
    of = {m.name: (i, m) for i, m in enumerate(tables.matrices(run.plan))}
    table, starts = tables.choices_table(held), tables.starts_table(held)
    colour = {start: SHADES[i % len(SHADES)] for i, (start, *_) in enumerate(starts.rows)}
    places = [(*of[row[0]], row) for row in table.rows if row[0] in of]
    columns = [str(n) for n in sorted({m.layer for _, m, _ in places if m.layer is not None})]
    columns += ["–"] if any(m.layer is None for _, m, _ in places) else []
    cells = [svg.Cell(m.kind, "–" if m.layer is None else str(m.layer), colour[row[1]], f"{100 * row[2]:.0f}", i) for i, m, row in places]
    kinds = list(dict.fromkeys(m.kind for _, m, _ in places))
    chart = svg.grid("What won every matrix", cells, kinds, columns, "layer") if cells else None
    key = [(colour[start], start, f"{count(won)} of {len(held)}") for start, _, won, _ in starts.rows]
    note = "The number in a cell is the output error that is left, in percent of that of the quantized weight alone (zeros)."
    head = f"{name}: the start with the least output error"
    return [Block(chart, head=head, note=note, key=key, tables=[table]), Block(tables=[starts], open=True)]


def _refined(name: str, held: Json) -> Block:
    table = tables.refined_table(held)
    steps = [(float(i), first, last) for i, (_, first, last, _) in enumerate(table.rows) if math.isfinite(first) and math.isfinite(last)]
    chart = None
    if len(steps) > 1:
        both = [(word, [(i, v[k]) for i, *v in steps]) for k, word in enumerate(("first epoch", "last epoch"))]
        series = [svg.Curve(word, f"s{k}", points, points) for k, (word, points) in enumerate(both)]
        chart = svg.curves("Losses of the refinement", series, "block, in order", "loss on the calibration rows")
    note = "Mean loss on the calibration rows against the unquantized model. Where a refinement lost more in its last epoch, it was undone."
    return Block(chart, head=f"{name}: refined on the calibration rows", note=note, tables=[table], open=chart is None)


def _menu(plan: Plan) -> Json:
    """What the heat map shows on hover. Sizes repeat from layer to layer, so each list of them is written once."""
    names: dict[str, int] = {}
    shapes: dict[str, int] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    rows = []
    for m in tables.matrices(plan):
        listed = tuple((names.setdefault(name, len(names)), held) for name, held, _ in m.menu)
        chosen = names.setdefault(m.chosen, len(names))
        shape = shapes.setdefault(m.dimensions or "", len(shapes))
        losses = [tables.brief(loss) for *_, loss in m.menu]
        rows.append([m.name, shape, chosen, m.bytes, tables.brief(m.loss), sizes.setdefault(listed, len(sizes)), losses])
    return {"names": list(names), "shapes": list(shapes), "sizes": [list(map(list, s)) for s in sizes], "rows": rows}


def _losses(run: Folder) -> Panel | None:
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
        series.append(svg.Curve(name, f"s{i % COLOURS}", raw, _smooth(raw, half), dots))
    notes += [f"{name}: the last line of events.jsonl is cut off and left out." for name in run.unfinished]
    if not series:
        return None
    halves = sorted({max(len(s.raw) // 16, 1) for s in series})
    window = " or ".join(str(2 * h + 1) for h in halves)
    lead = f"Faint: every step. Strong: centred mean over {window} points, fewer towards the ends." + (
        " Rings: evaluation during training." if eval_dots else ""
    )
    chart = svg.curves("Training loss", series, "step", "loss (nats per trained token)")
    steps = sorted({s for c in series for s, _ in c.raw})
    values = [(dict(c.raw), dict(c.smooth)) for c in series]
    rows = [(int(s), *(None if s not in v else round(v[s], 4) for pair in values for v in pair)) for s in steps]
    heads = [Column(h, number) for c in series for h in (c.name, f"{c.name} smoothed")]
    table = Table("loss of every step", (Column("step", count), *heads), rows)
    ends = [(c.name, int(c.raw[-1][0]), c.raw[0][1], c.smooth[-1][1], min(v for _, v in c.smooth)) for c in series]
    end_heads = (Column("run"), Column("steps", count), *(Column(h, number) for h in ("first step", "end, smoothed", "lowest, smoothed")))
    return Panel(
        "loss", "Training loss", [Block(chart, note=" ".join(notes), tables=[Table("end of every run", end_heads, ends), table])], lead
    )


def _steps(events: Sequence[Json], kind: str) -> list[svg.Point]:
    """(step, loss) of one kind of event; a step that was done again after a resume counts once, the last time."""
    found = {float(e["step"]): float(e["loss"]) for e in events if e.get("event") == kind and e.get("loss") is not None and "step" in e}
    return sorted(found.items())


def _smooth(points: Sequence[svg.Point], half: int) -> list[svg.Point]:
    """Centred means; the window shrinks evenly towards both ends so that nothing is shifted."""
    smooth = []
    for i, (s, _) in enumerate(points):
        k = min(half, i, len(points) - 1 - i)
        near = points[i - k : i + k + 1]
        smooth.append((s, sum(v for _, v in near) / len(near)))
    return smooth


def _evaluation(run: Folder) -> Panel | None:
    if not run.evaluation or not run.evaluation.get("entries"):
        return None
    entries = run.evaluation["entries"]
    blocks = []
    for quantity, axis, show, times, zero in CHARTS:
        marks = []
        for e in entries:
            if e.get(quantity) is None:
                continue
            ends = (e.get("intervals") or {}).get(quantity) or (None, None)
            low, high = (None if v is None else times * v for v in ends)
            shown = tables.span(show)((e[quantity], *ends))
            marks.append(svg.Dot(e["name"], times * e[quantity], low, high, _hue(run, e), shown))
        if marks:
            blocks.append(Block(svg.dots(axis, marks, axis, zero), half=True))
    blocks.append(Block(tables=[tables.evaluation_table(run.evaluation)], open=True))
    pairs = tables.paired_table(run.evaluation)
    if pairs.rows:
        note = "Both models on the same rows. “Lower” and “higher” mean that the interval leaves out zero."
        blocks.append(Block(head="Paired differences", note=note, tables=[pairs], open=True))
    said, few = tables.verdict(run.evaluation), tables.too_few(run.evaluation)
    over = f"{count(run.evaluation.get('rows'))} held-out rows, {count(run.evaluation.get('tokens'))} tokens. "
    lines = f"No intervals: {few}." if few else "Lines are 95% intervals by resampling rows."
    lead = f"{said} " * bool(said) + over + f"Open circles are starting points, filled ones have been trained. {lines}"
    return Panel("evaluation", "Evaluation", blocks, lead)


def _hue(run: Folder, entry: Json) -> str:
    """A run keeps its colour in every chart; its starting point is hollow."""
    key = run.main if entry["key"] == "export" else entry["key"].removesuffix("_start")
    colour = f"s{run.runs.index(key) % COLOURS}" if key in run.runs else "neutral"
    return f"{colour} hollow" if entry.get("stage") == "start" else colour


def _samples(run: Folder) -> Panel | None:
    if not run.samples:
        return None
    shown = [{k: _cut(s.get(k)) for k in ("prompt", "reference", "before", "after")} for s in run.samples[:SAMPLES]]
    lead = f"The first {len(shown)} of {len(run.samples)}." if len(run.samples) > len(shown) else ""
    return Panel("samples", "Samples before and after", [Block(samples=shown)], lead)


def _cut(said: Any) -> str | None:
    if said is None:
        return None
    said = str(said)
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} … ({len(said) - LONGEST:,} more characters)"


def _export(run: Folder) -> Panel | None:
    if not run.export:
        return None
    paths = [(t["name"], t.get("path") or tables.ABSENT) for t in run.export["targets"]]
    verified = any(t.get("verdict") for t in run.export["targets"])
    over = f"{count(run.export.get('rows'))} held-out rows. What is held to: {tables.held_to(run.export)}"
    lead = f"Loaded again from disk and compared with the trained model on {over}." if verified else "Written and not verified."
    return Panel("export", "Export verification", [Block(tables=[tables.export_table(run.export)], facts=paths, open=True)], lead)


def _data(run: Folder) -> Panel | None:
    data = run.data
    if not data:
        return None
    blocks = []
    lengths = data.get("lengths") or {}
    bins = lengths.get("histogram") or []
    if bins:
        edges = [0, *(b[0] for b in bins)]
        counts = [b[1] for b in bins]
        marked = {f"{k} {lengths[k]:,}": float(lengths[k]) for k in ("p50", "p95", "max") if lengths.get(k) is not None}
        marked |= {f"cut at {data['max_length']:,}": float(data["max_length"])} if data.get("max_length") else {}
        even = len({b - a for a, b in zip(edges, edges[1:], strict=False)}) == 1
        note = "" if even else "Bins are drawn equally wide; they are not equally long."
        table = Table(
            "lengths",
            (Column("over", count), Column("up to tokens", count), Column("rows", count)),
            list(zip(edges, edges[1:], counts, strict=False)),
        )
        chart = svg.histogram("Lengths of rows", edges, counts, marked, "tokens in a row")
        blocks.append(Block(chart, head="Lengths", note=note, tables=[table], half=True))
    facts = [("File", f"{data.get('path', tables.ABSENT)} ({data.get('format', tables.ABSENT)})"), ("Rows", count(data.get("rows")))]
    chart, listed = None, []
    if data.get("tokens"):
        trained = data.get("trained_tokens") or 0
        rest = data["tokens"] - trained
        facts += [("Tokens", count(data["tokens"])), ("Trained", f"{count(trained)} ({percent(trained / data['tokens'])})")]
        bar = svg.Bar("tokens", [("trained", trained, "s0 fill"), ("context", rest, "planned")])
        chart = svg.bars("Trained share of the tokens", [bar], lambda v: f"{v:,.0f}", "tokens", width=520)
        columns = Column("tokens"), Column("count", count), Column("share", percent)
        listed = [Table("trained", columns, [(k, v, v / data["tokens"]) for k, v in (("trained", trained), ("context", rest))])]
    facts += [("Truncated rows", count(data.get("truncated")))]
    facts += [("Chat template", f"sha {data['template_sha']}")] if data.get("template_sha") else []
    blocks.append(Block(chart, head="Trained share", tables=listed, facts=facts, half=True, problems=data.get("problems") or ()))
    preview = [{"line": p.get("line"), "pieces": _pieces(p["pieces"])} for p in (data.get("preview") or [])[:PREVIEWS]]
    if preview:
        blocks.append(Block(head="Mask preview", note="Marked text is what the loss sees.", preview=preview))
    return Panel("data", "Data", blocks)


def _pieces(pieces: Sequence[Sequence[Any]]) -> list[tuple[str, bool]]:
    """The pieces of one row, cut where the row gets long."""
    kept, room = [], LONGEST
    for said, trained in pieces:
        kept.append((str(said)[:room], bool(trained)))
        room -= len(str(said))
        if room <= 0:
            return [*kept, (" …", False)]
    return kept


def _reproduce(run: Folder) -> Panel:
    plan = run.plan
    facts = [
        ("Plan", plan.hash),
        ("Model", plan.model or tables.ABSENT),
        ("Model hash", plan.model_hash or tables.ABSENT),
        ("Seed", str(plan.seed)),
    ]
    versions = next((e["versions"] for events in run.events.values() for e in events if e.get("versions")), None)
    facts += [(k, str(v)) for k, v in (versions or {}).items()]
    used = {
        (shape, value["paper"])
        for spec in plan.modules.values()
        for slot, shape in (("format", "formats"), ("quantizer", "quantizers"), ("adapter", "adapters"), ("init", "init"))
        if (value := registry.to_json(getattr(spec, slot))) is not None and (slot != "quantizer" or spec.format is not None)
    }
    cited = [registry.head(*u) for u in sorted(used)]
    blocks = [Block(facts=facts, half=bool(cited)), Block(head="Methods used", cited=cited, half=True)]
    if run.recipe:
        blocks.append(Block(head="recipe.yaml", code=run.recipe))
    return Panel("reproduce", "Reproduce", blocks)
