"""Two runs, and in what they differ: recipe, data, versions and machine, plan, results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from finebits.report import cells
from finebits.report.cells import ABSENT, Column, Json, Table, number, percent, size
from finebits.report.summary import Summary, took
from finebits.runfolder import flat

UNTOLD = ("output_dir",)  # two folders are never called the same
Pairs = Iterator[tuple[str, Any, Any]]


def differences(a: Summary, b: Summary) -> list[Table]:
    """A table of each section in which they differ, in the order above."""
    sections = (("recipe", _recipe), ("data", _data), ("versions and machine", _made_on), ("plan", _plan), ("results", _results))
    tables = []
    for name, section in sections:
        rows = [(key, _said(x), _said(y)) for key, x, y in section(a, b) if x != y]
        if rows:
            tables.append(Table(name, (Column(name), Column(a.path.as_posix()), Column(b.path.as_posix())), rows))
    return tables


def _said(value: Any) -> str:
    return ABSENT if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _both(a: Json, b: Json) -> Pairs:
    for key in dict.fromkeys((*a, *b)):
        yield key, a.get(key), b.get(key)


def _recipe(a: Summary, b: Summary) -> Pairs:
    for key, x, y in _both(dict(flat(a.settings)), dict(flat(b.settings))):
        if key not in UNTOLD:
            yield key, x, y


def _data(a: Summary, b: Summary) -> Pairs:
    x, y = a.about.get("data") or {}, b.about.get("data") or {}
    for key in ("rows", "held_out", "fingerprint"):
        yield key, x.get(key), y.get(key)
    named = lambda data: {f["path"]: str(f.get("sha256", ""))[:12] for f in data.get("files") or ()}  # noqa: E731
    yield from _both(named(x), named(y))


def _made_on(a: Summary, b: Summary) -> Pairs:
    for part in ("model", "versions", "machine"):
        yield from _both(dict(flat(a.about.get(part) or {})), dict(flat(b.about.get(part) or {})))


def _plan(a: Summary, b: Summary) -> Pairs:
    yield "plan", a.record.get("plan"), b.record.get("plan")
    each: tuple[tuple[str, Callable[[Summary], str]], ...] = (
        ("budget", lambda s: size(s.plan.get("budget"))),
        ("bits of a linear weight", lambda s: ABSENT if s.bits is None else f"{s.bits:.3f}"),
        ("training peak, planned", lambda s: size(s.planned)),
        ("formats", lambda s: ", ".join(f"{f} on {n}" for f, n in _formats(s).most_common()) or ABSENT),
    )
    for name, show in each:
        yield name, show(a), show(b)
    x, y = a.plan.get("modules") or {}, b.plan.get("modules") or {}
    others = [name for name in dict.fromkeys((*x, *y)) if x.get(name) != y.get(name)]
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        yield f"{len(others)} of {len(x.keys() | y.keys())} matrices are treated otherwise", shown, ABSENT


def _formats(run: Summary) -> Counter[str]:
    return Counter(cells.short(spec.get("format")) for spec in (run.plan.get("modules") or {}).values())


def _results(a: Summary, b: Summary) -> Pairs:
    for stage, word in (("start", "held-out loss before"), ("tuned", "held-out loss after")):
        show_loss = cells.span(number)
        yield word, show_loss(a.loss(stage)), show_loss(b.loss(stage))
    kinds: tuple[tuple[str, Callable[[Any], str]], ...] = (("kl", number), ("top1", percent), ("accuracy", percent))
    for key, show in kinds:
        x, y = (show((s.entry("tuned") or {}).get(key)) for s in (a, b))
        yield f"{key}, tuned", x, y
    yield "training peak, measured", size(a.measured), size(b.measured)
    x, y = (ABSENT if s.steps is None else str(s.steps[0]) for s in (a, b))
    yield "steps", x, y
    rate = lambda s: (s.record.get("pace") or {}).get("tokens_per_second")  # noqa: E731
    yield "tokens/s", number(rate(a), 1), number(rate(b), 1)
    yield "took", took(a.seconds), took(b.seconds)
    yield "status", a.status, b.status
