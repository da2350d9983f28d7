"""What a run folder has come to, from its files alone: no tensor, no plan is made, so that many folders are listed in no time."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finebits.errors import Invalid, NoRun, WrongUse
from finebits.report import cells
from finebits.report.cells import ABSENT, Column, Json, Table, count, number, signed, size, span
from finebits.runfolder import (
    CHECKPOINTS,
    DATA,
    EVALUATION,
    EVENTS,
    FULL,
    MEMORY,
    MODEL,
    PLAN,
    PLANS,
    RECORD,
    RUNS,
    SCHEMA,
    STARTED,
    TARGETS,
    RunFolder,
)

DEPTH = 4  # folders below the one that is named in which runs are looked for
PLANNED, UNREADABLE = "planned", "unreadable"  # how a folder stands that no record speaks for
INSIDE = {TARGETS, CHECKPOINTS, STARTED, MODEL, PLANS}  # folders of a run that hold no run


@dataclass(frozen=True)
class Summary:
    """A run folder in short. None or empty is what its files do not say."""

    path: Path
    status: str
    record: Json = field(default_factory=dict)
    plan: Json = field(default_factory=dict)
    data: Json = field(default_factory=dict)
    memory: Json = field(default_factory=dict)
    evaluation: Json = field(default_factory=dict)
    events: Sequence[Json] = ()
    main: str = ""
    problem: str = ""

    @property
    def settings(self) -> Json:
        return self.record.get("settings") or {}

    @property
    def about(self) -> Json:
        return self.record.get("about") or {}

    @property
    def model(self) -> str:
        """The last part of its name."""
        name = str((self.settings.get("model") or {}).get("model_name_or_path") or self.plan.get("model") or "")
        return name.rstrip("/").rpartition("/")[2].removeprefix("package:")

    @property
    def rows_of(self) -> str:
        """The names of the files that it learns from."""
        named = [Path(d["path"]).name for d in (self.settings.get("data") or {}).get("datasets") or []]
        return ", ".join(named[:2]) + (f" and {len(named) - 2} more" if len(named) > 2 else "")

    @property
    def bits(self) -> float | None:
        """Stored bits of a linear weight, the ends of the model left out as everywhere (finebits.plan.base.at_end)."""
        costs = [c for c in (self.plan.get("costs") or {}).values() if c.get("shape")]
        costs = [c for c in costs if not (c.get("head") or c.get("embeddings"))] or costs
        weights = sum(math.prod(c["shape"]) for c in costs)
        return 8 * sum(c["bytes"] for c in costs) / weights if weights else None

    @property
    def steps(self) -> tuple[int, int] | None:
        """(done, in all) of the run that follows the plan; a step that was done again counts once."""
        done = [e for e in self.events if e.get("event") == "step" and "step" in e]
        return (max(int(e["step"]) for e in done), int(done[-1].get("total") or 0)) if done else None

    def entry(self, stage: str) -> Json | None:
        """What the evaluation has of the own run, tuned, or (start) of the model before it: unquantized where that was scored."""
        entries = {e["key"]: e for e in self.evaluation.get("entries") or ()}
        return entries.get(self.main) if stage == "tuned" else entries.get(FULL) or entries.get(f"{self.main}_start")

    def loss(self, stage: str) -> tuple[float | None, float | None, float | None]:
        """Held-out loss with its interval."""
        entry = self.entry(stage) or {}
        low, high = (entry.get("intervals") or {}).get("loss") or (None, None)
        return entry.get("loss"), low, high

    @property
    def planned(self) -> int | None:
        """Bytes of the training peak, as planned."""
        terms = self.plan.get("memory") or {}
        return sum(terms.values()) if terms else None

    @property
    def measured(self) -> int | None:
        return self.memory.get("measured_peak")

    @property
    def begun(self) -> float | None:
        """The time at which the first session began, or the first event."""
        sessions = self.record.get("sessions") or ()
        return sessions[0].get("begun") if sessions else next((e["t"] for e in self.events if "t" in e), None)

    @property
    def seconds(self) -> float | None:
        """That all sessions have worked; None where none has ended."""
        ended = [s["seconds"] for s in self.record.get("sessions") or () if s.get("seconds") is not None]
        return sum(ended) if ended else None

    @property
    def told(self) -> list[str]:
        """What there is to judge it by, in words."""
        sources = {"data check": self.data, "events": self.events, "memory": self.memory, "scores": self.evaluation, "record": self.record}
        return [word for word, found in sources.items() if found]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        before, after = ({"loss": v, "low": lo, "high": hi} for v, lo, hi in (self.loss("start"), self.loss("tuned")))
        return {
            "path": str(self.path),
            "status": self.status,
            "model": self.model,
            "data": self.rows_of,
            "bits": self.bits,
            "steps": list(self.steps) if self.steps else None,
            "before": before,
            "after": after,
            "memory": {"budget": self.plan.get("budget"), "planned": self.planned, "measured": self.measured},
            "begun": self.begun,
            "seconds": self.seconds,
            **({"problem": self.problem} if self.problem else {}),
        }


def read(path: Path) -> Summary:
    """The summary of a folder. What cannot be read makes it unreadable, and `problem` says why."""
    folder = RunFolder(path)
    try:
        record, plan = folder.record(), json_of(path / PLAN) or {}
        evaluation = json_of(path / EVALUATION) or {}
        ran = sorted(p.parent.name for p in (path / RUNS).glob(f"*/{EVENTS}"))
        main = evaluation.get("main") or main_of(plan, ran)
        run = folder.run(main) if main else None
        lines = events(run / EVENTS)[0] if run is not None and (run / EVENTS).exists() else []
        memory = (json_of(run / MEMORY) or {}) if run is not None else {}
        status = folder.status or ("unfinished" if ran else PLANNED)
        return Summary(path, status, record, plan, json_of(path / DATA) or {}, memory, evaluation, lines, main)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return Summary(path, UNREADABLE, problem=str(e) if isinstance(e, Invalid) else f"its files are not as finebits writes them ({e!r})")


def main_of(plan: Json, ran: Sequence[str]) -> str:
    """The run that follows the plan: the one that is called as most starts in it, or else the first."""
    inits = (spec.get("init") for spec in (plan.get("modules") or {}).values() if spec.get("adapter") is not None)
    starts = Counter((init if isinstance(init, str) else init["paper"]) for init in inits if init)
    names = [name for name, _ in starts.most_common()]
    return next((name for name in names if name in ran), next((name for name in ran if name not in (FULL, "export")), ""))


def found(folders: Sequence[Path]) -> Iterator[Path]:
    """Every run folder in these folders, and in those below them; links are not followed."""
    seen = set[Path]()
    for top in folders:
        if not top.is_dir():
            raise WrongUse(f"there is no folder {top}: name an output_dir, or a folder of some")
        for place, inside, names in os.walk(top):
            path = Path(place)
            if is_run(path, names) and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path
            deep = len(path.relative_to(top).parts) >= DEPTH
            inside[:] = [] if deep else sorted(n for n in inside if n not in INSIDE and not n.startswith("."))


def is_run(path: Path, names: Sequence[str]) -> bool:
    """Does a folder with files of these names hold a run, or a plan for one? Records and plans of others do not count."""
    return any(n in names and mark in (path / n).read_bytes()[:64] for n, mark in ((RECORD, SCHEMA.encode()), (PLAN, b"finebits.plan/")))


def opened(path: Path) -> Summary:
    """The summary of a folder that is to hold a run. Raises NoRun where it holds none, Invalid where it holds one that cannot be read."""
    if not path.is_dir() or not is_run(path, os.listdir(path)):
        raise NoRun.of(path)
    summary = read(path)
    if summary.problem:
        raise Invalid(f"{path} cannot be read: {summary.problem}")
    return summary


def table(summaries: Sequence[Summary]) -> Table:
    """One row a run."""
    from datetime import datetime

    losses = span(lambda v: number(v, 3))
    rows = []
    for s in summaries:
        off = None if not s.planned or s.measured is None else s.measured / s.planned - 1
        peak = size(s.measured) + (f" ({signed(off)})" if off is not None else "")
        steps = ABSENT if s.steps is None else count(s.steps[0]) + (f"/{count(s.steps[1])}" if s.steps[0] < s.steps[1] else "")
        when = None if s.begun is None else datetime.fromtimestamp(s.begun).strftime("%Y-%m-%d %H:%M")
        rows.append(
            (
                str(s.path),
                s.status,
                s.model,
                s.rows_of,
                s.bits,
                steps,
                s.loss("start")[0],
                s.loss("tuned"),
                s.planned,
                peak,
                s.seconds,
                when,
            )
        )
    columns = (
        Column("run"),
        Column("status"),
        Column("model", cells.text, optional=True),
        Column("data", cells.text, optional=True),
        Column("bits", lambda v: ABSENT if v is None else f"{v:.2f}"),
        Column("steps", str),
        Column("loss before", lambda v: number(v, 3)),
        Column("after", losses, ("loss", "loss low", "loss high")),
        Column("planned", size, optional=True),
        Column("measured", str, optional=True),
        Column("took", took, optional=True),
        Column("when", cells.text, optional=True),
    )
    return Table("runs", columns, rows)


def took(seconds: float | None) -> str:
    """Seconds for a reader.

    >>> took(42.4), took(135), took(7260), took(None)
    ('42 s', '2 min 15 s', '2 h 1 min', '–')
    """
    if seconds is None:
        return ABSENT
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


# --- files ---------------------------------------------------------------------------------------------------------------------------


def json_of(path: Path) -> Any:
    """What a JSON file says; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as e:
        raise Invalid(f"{path} is not JSON (line {e.lineno}): {e.msg}. Delete it to get the page without its panel.") from None


def events(path: Path) -> tuple[list[Json], bool]:
    """The events, and whether the last line was cut off (a run that was killed, or is still writing)."""
    found: list[Json] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for i, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as e:
            if i == len(lines) - 1 and not line.endswith("\n"):
                return found, True
            raise Invalid(f"{path}, line {i + 1}, is not JSON: {e.msg}. One event a line is wanted.") from None
    return found, False
