"""A run folder as a page needs it: every file that is there, read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finebits import registry
from finebits.plan.base import Plan
from finebits.report.cells import Json
from finebits.report.summary import events as events_in
from finebits.report.summary import json_of
from finebits.report.templates import Template, held, of_model
from finebits.runfolder import CHOICES, DATA, EVALUATION, EVENTS, EXPORTED, MEMORY, PLAN, RECIPE, RECORD, REFINED, RUNS, SAMPLES, RunFolder


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
    record: Json = field(default_factory=dict)
    base: Template | None = None  # the chat template of the model that was tuned,
    templates: dict[str, Template] = field(default_factory=dict)  # and those of its exports

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
        figures = json_of(run / MEMORY)
        if figures is not None:
            memory[run.name] = figures
        for file, into in ((CHOICES, chosen), (REFINED, refined)):
            content = json_of(run / file)
            if content:
                into[run.name] = content
        if (run / EVENTS).exists():
            events[run.name], cut = events_in(run / EVENTS)
            unfinished += [run.name] if cut else []
    recipe = folder / RECIPE
    return Folder(
        plan,
        folder.resolve().name,
        recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        json_of(folder / DATA),
        memory,
        events,
        unfinished,
        json_of(folder / EVALUATION),
        json_of(folder / SAMPLES) or (),
        json_of(folder / EXPORTED),
        chosen,
        refined,
        json_of(folder / RECORD) or {},
        of_model(plan.model),
        {name: found for name, place in _targets(folder).items() if (found := held(place)) is not None},
    )


def _targets(folder: Path) -> dict[str, Path]:
    """The folder of every target that was exported, where it is now."""
    exported = json_of(folder / EXPORTED) or {}
    return {t["name"]: RunFolder(folder).target(t["name"]) for t in exported.get("targets", ())}
