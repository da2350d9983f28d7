"""A run folder as a page needs it: every file that is there, read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finebits import registry
from finebits.errors import Invalid
from finebits.plan.base import Plan
from finebits.report.cells import Json
from finebits.runfolder import CHOICES, DATA, EVALUATION, EVENTS, EXPORTED, MEMORY, PLAN, RECIPE, REFINED, RUNS, SAMPLES


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


def read(folder: Path) -> Folder:
    """Everything that a page shows, from the files of a run folder."""
    plan = Plan.load(folder / PLAN)
    memory, events, unfinished = {}, {}, []
    chosen, refined = {}, {}
    for run in sorted((folder / RUNS).glob("*/")):
        figures = _json(run / MEMORY)
        if figures is not None:
            memory[run.name] = figures
        for file, into in ((CHOICES, chosen), (REFINED, refined)):
            content = _json(run / file)
            if content:
                into[run.name] = content
        if (run / EVENTS).exists():
            events[run.name], cut = _events(run / EVENTS)
            unfinished += [run.name] if cut else []
    recipe = folder / RECIPE
    return Folder(
        plan,
        folder.resolve().name,
        recipe.read_text() if recipe.exists() else "",
        _json(folder / DATA),
        memory,
        events,
        unfinished,
        _json(folder / EVALUATION),
        _json(folder / SAMPLES) or (),
        _json(folder / EXPORTED),
        chosen,
        refined,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as e:
        raise Invalid(f"{path} is not JSON (line {e.lineno}): {e.msg}. Delete it to get the page without its panel.") from None


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
            raise Invalid(f"{path}, line {i + 1}, is not JSON: {e.msg}. One event a line is wanted.") from None
    return events, False
