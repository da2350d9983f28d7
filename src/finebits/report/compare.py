"""One page for several runs: memory, what fitted, losses and scores over one another, and in what the runs differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finebits.errors import Invalid
from finebits.report import cells, results, summary, svg, tables
from finebits.report.cells import ABSENT, Column, Json, Table, number, percent, signed, size
from finebits.report.folder import Folder, read
from finebits.report.page import rendered
from finebits.report.panels import evaluation, loss
from finebits.report.panels.base import COLOURS, Block, Panel, Tile
from finebits.report.panels.memory import TERMS
from finebits.report.panels.reproduce import machine, pace
from finebits.runfolder import flat

MOST = COLOURS  # runs: each has a colour of its own
Runs = dict[str, Folder]


def page(folders: Sequence[Path]) -> str:
    """The page. Raises Invalid where they are fewer than two, or more than there are colours."""
    if not 2 <= len(folders) <= MOST:
        raise Invalid(f"a comparison is of 2 to {MOST} runs, and {len(folders)} came: finebits runs ls lists any number of them")
    runs = {name: read(folder) for name, folder in zip(names(folders), folders, strict=True)}
    panels = [memory(runs), pareto(runs), loss.panel(merged(runs)), scores(runs), settings(runs), made_on(runs)]
    models = list(dict.fromkeys(Path(run.plan.model).name or "unnamed model" for run in runs.values()))
    return rendered(" · ".join(models), f"{len(runs)} runs: {', '.join(runs)}", "", tiles(runs), [p for p in panels if p is not None])


def names(folders: Sequence[Path]) -> list[str]:
    """What runs are called here: the last parts of their paths, as many as it takes to tell them apart.

    >>> names([Path("runs/a"), Path("runs/b")]), names([Path("x/a"), Path("y/a")])
    (['a', 'b'], ['x/a', 'y/a'])
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise Invalid("a folder is named twice: name runs that are not the same")
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def merged(runs: Runs) -> Folder:
    """The runs that followed their plans, as if they were those of one folder."""
    first = next(iter(runs.values()))
    events = {name: run.events[run.main] for name, run in runs.items() if run.main in run.events}
    cut = [name for name, run in runs.items() if run.main in run.unfinished]
    kept = {name: run.memory[run.main] for name, run in runs.items() if run.main in run.memory}
    return Folder(first.plan, memory=kept, events=events, unfinished=cut, evaluation=_evaluation(runs))


def own(run: Folder, stage: str = "") -> Json | None:
    """Of the evaluation, the entry of the run that followed the plan, or that of its start."""
    key = (run.evaluation or {}).get("main") or run.main
    return next((e for e in (run.evaluation or {}).get("entries", ()) if e["key"] == key + stage), None)


def _evaluation(runs: Runs) -> Json | None:
    """Every run's start and end, and the unquantized model once for all that were scored on the same rows."""
    entries, seen = [], set[Any]()
    for name, run in runs.items():
        told = run.evaluation or {}
        full = next((e for e in told.get("entries", ()) if e["key"] == "full"), None)
        at = full and (run.plan.model_hash, told.get("rows"), told.get("tokens"), round(full["loss"], 6))
        if full is not None and at not in seen:
            seen.add(at)
            entries.append(
                dict(full)
                | {"key": f"full {len(seen)}", "paired": None, "name": "full precision, untuned" + f" ({name})" * (len(seen) > 1)}
            )
        for stage, word, key in (("_start", "start, untuned", f"{name}_start"), ("", "tuned", name)):
            entry = own(run, stage)
            entries += [{**entry, "key": key, "name": f"{name} {word}", "paired": None}] if entry is not None else []
    if not entries:
        return None
    first = next(run.evaluation for run in runs.values() if run.evaluation)
    return {"entries": entries, "rows": first.get("rows"), "tokens": first.get("tokens"), "unit": first.get("unit", "tokens"), "main": ""}


def tiles(runs: Runs) -> list[Tile]:
    """The best of each kind."""
    losses = {n: e["loss"] for n, run in runs.items() if (e := own(run)) is not None and e.get("loss") is not None}
    peaks = {n: run.memory[run.main]["measured_peak"] for n, run in runs.items() if (run.memory.get(run.main) or {}).get("measured_peak")}
    took = {n: sum(s) for n, run in runs.items() if (s := [x["seconds"] for x in run.record.get("sessions") or () if x.get("seconds")])}
    shown = []
    kinds: tuple[tuple[str, dict[str, Any], Callable[[Any], str]], ...] = (
        ("lowest held-out loss", losses if _alike(runs) else {}, lambda v: number(v, 3)),
        ("smallest training peak", peaks, size),
        ("shortest", took, summary.took),
    )
    for label, values, show in kinds:
        if len(values) > 1:
            best = min(values, key=lambda n: values[n])
            shown.append(Tile(label, show(values[best]), best, "good"))
    return shown


def _alike(runs: Runs) -> bool:
    """Were all scored on the same rows, as far as their files say?"""
    rows = {((run.evaluation or {}).get("rows"), (run.evaluation or {}).get("tokens")) for run in runs.values() if run.evaluation}
    data = {run.record.get("data") for run in runs.values() if run.record}
    return len(rows) <= 1 and len(data) <= 1


def memory(runs: Runs) -> Panel:
    """Planned and measured peaks, run by run."""
    measured = {name: (run.memory.get(run.main) or {}).get("measured_peak") for name, run in runs.items()}
    order = list(dict.fromkeys(term for run in runs.values() for term, v in run.plan.memory.items() if v))
    colour = {term: f"t{i % TERMS}" for i, term in enumerate(order)}
    budgets = {run.plan.budget for run in runs.values()}
    budget = next(iter(budgets)) if len(budgets) == 1 else None
    unit, step = cells.unit(max([budget or 0, *(run.plan.peak for run in runs.values()), *(v or 0 for v in measured.values())]))
    bars, rows = [], []
    for name, run in runs.items():
        plan, peak = run.plan, measured[name]
        pieces = [(term, v / step, f"{colour[term]} fill") for term, v in plan.memory.items() if v]
        bars.append(svg.Bar(f"{name} planned", pieces, size(plan.peak), name))
        off = results.deviation(plan.peak, peak)
        if peak is not None:
            bars.append(svg.Bar("measured", [("training peak", peak / step, "measured")], f"{size(peak)}  {signed(off)}", name))
        average = tables.average_bits(tables.matrices(plan))
        rows.append((name, average, plan.budget, plan.peak, peak, off, *(plan.memory.get(term) for term in order)))
    limit = None if budget is None else (f"budget {size(budget)}", budget / step)
    show = lambda v: f"{v:,.1f} {unit}"  # noqa: E731
    chart = svg.fitted(lambda w: svg.bars("Memory planned and measured", bars, show, "training peak", limit, w))
    heads = [Column("run"), Column("bits", tables.bits), Column("budget", size), Column("planned", size), Column("measured", size)]
    heads += [Column("deviation", signed), *(Column(term, size) for term in order)]
    key = [(colour[term], term, "") for term in order]
    note = "" if budget is not None or budgets == {None} else "The budgets differ: they are in the table."
    block = Block(chart, note=note, key=key, tables=[Table("memory", tuple(heads), rows)])
    return Panel("memory", "Memory, planned and measured", [block])


def pareto(runs: Runs) -> Panel | None:
    """What each plan chose from: memory against expected loss."""
    curves = {name: run.plan.solver.get("pareto") or [] for name, run in runs.items()}
    chosen = {name: run.plan.solver["loss"] for name, run in runs.items() if run.plan.solver.get("loss") is not None}
    if not chosen or not any(run.plan.peak for run in runs.values()):
        return None
    words = {tables.loss_word(runs[name].plan) for name in chosen}
    word = next(iter(words)) if len(words) == 1 else "expected loss"
    unit, step = cells.unit(max(*(run.plan.peak for run in runs.values()), *(p["peak"] for c in curves.values() for p in c), 1))
    lines, marks, rows = [], [], []
    for i, (name, run) in enumerate(runs.items()):
        hue, points = f"s{i % COLOURS}", [(p["peak"] / step, p["loss"]) for p in curves[name]]
        lines += [(hue, points)] if len(points) > 1 else []
        rows += [(name, p["peak"], p["loss"], "") for p in curves[name]]
        if name in chosen:
            tip = f"{name}\n{size(run.plan.peak)}   {word} {tables.figures(chosen[name])}"
            marks.append(svg.Mark(run.plan.peak / step, chosen[name], hue, name, tip, True))
            rows.append((name, run.plan.peak, chosen[name], "chosen"))
            peak = (run.memory.get(run.main) or {}).get("measured_peak")
            if peak is not None:
                marks.append(svg.Mark(peak / step, chosen[name], f"{hue} hollow", "", f"{name}, measured {size(peak)}"))
                rows.append((name, peak, chosen[name], "measured"))
    show = lambda v: f"{v:,.1f} {unit}"  # noqa: E731
    chart = svg.fitted(lambda w: svg.front("Memory against expected loss", lines, marks, "training peak", word, None, show, w))
    heads = Column("run"), Column("training peak", size), Column(word, tables.figures), Column("point")
    note = "Rings: what was chosen. Open circles: its measured peak. Lines: the best mixed plan of every budget, where that was solved."
    models = {(run.plan.model_hash or run.plan.model) for run in runs.values()}
    note += " The models or the objectives differ, so heights do not compare." if len(models) > 1 or len(words) > 1 else ""
    return Panel("choice", "What fitted", [Block(chart, note=note, tables=[Table("pareto", heads, rows)])])


def scores(runs: Runs) -> Panel | None:
    """The evaluation of all runs; where they were not scored on the same rows it says so."""
    panel = evaluation.panel(merged(runs))
    if panel is None or _alike(runs):
        return panel
    lead = "These runs were not scored on the same rows: levels do not compare. Open circles are starting points, filled ones have been trained."
    return Panel(panel.name, panel.title, panel.blocks, lead)


def settings(runs: Runs) -> Panel:
    """The keys of the recipes that are not the same everywhere."""
    each = [dict(flat(run.record.get("settings") or {})) for run in runs.values()]
    keys = [k for k in dict.fromkeys(k for s in each for k in s) if k != "output_dir" and len({json.dumps(s.get(k)) for s in each}) > 1]
    rows = [(key, *(ABSENT if key not in s else json.dumps(s[key], ensure_ascii=False) for s in each)) for key in keys]
    table = Table("settings", (Column("key"), *(Column(name) for name in runs)), rows)
    untold = [name for name, run in runs.items() if not run.record.get("settings")]
    lead = f"{len(keys)} key{'' if len(keys) == 1 else 's'} of their recipes." + (
        f" Nothing is recorded of {', '.join(untold)}." if untold else ""
    )
    return Panel("settings", "In what they differ", [Block(tables=[table], open=True)] if rows else [], lead)


def made_on(runs: Runs) -> Panel:
    """What each was made of and on, how long it took, by which commands."""
    facts: dict[str, dict[str, str]] = {}
    for name, run in runs.items():
        about = run.record.get("about") or {}
        model, data, entry = about.get("model") or {}, about.get("data") or {}, own(run) or {}
        told = [
            ("plan", run.plan.hash),
            ("model", run.plan.model),
            ("model hash", run.plan.model_hash),
            ("model revision", model.get("revision")),
            ("rows", data.get("fingerprint")),
            ("seed", str(run.plan.seed)),
            *((k.lower(), v) for k, v in (*machine(about), *pace(run))),
            ("held-out loss", number(entry.get("loss"), 4)),
            ("top-1 agreement", percent(entry.get("top1"))),
            *(about.get("versions") or {}).items(),
            ("commands", "; ".join(s["command"] for s in run.record.get("sessions") or ())),
        ]
        for key, value in told:
            facts.setdefault(key, {})[name] = str(value) if value else ""
    rows = [(key, *(by.get(name) or ABSENT for name in runs)) for key, by in facts.items() if any(by.values())]
    table = Table("made on", (Column(""), *(Column(name) for name in runs)), rows)
    return Panel("reproduce", "Reproduce", [Block(tables=[table], open=True)])
