"""A case, what is said of it, and the rules in the order in which they are asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from finebits.report.cells import Json
from finebits.report.summary import Summary

WINDOW = 8  # parts of a run: its ends are judged by the mean of the first and the last of them


@dataclass(frozen=True)
class Cause:
    """A likely cause: its name, what is the matter, the figures that say so, and what to do. `sure` is fail where the run cannot be used as it
    is, warn where it could be better, info where it is good to know."""

    kind: str
    sure: str
    what: str
    evidence: str
    fix: str

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """A run, seen as the rules see it."""

    run: Summary

    @cached_property
    def steps(self) -> list[Json]:
        """The events of its steps in order; one that was done again counts once, the last time."""
        by_step = {int(e["step"]): e for e in self.run.events if e.get("event") == "step" and "step" in e}
        return [by_step[k] for k in sorted(by_step)]

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss)."""
        return [(int(e["step"]), float(e["loss"])) for e in self.steps if e.get("loss") is not None]

    @cached_property
    def finite(self) -> list[tuple[int, float]]:
        return [(s, v) for s, v in self.losses if math.isfinite(v)]

    @cached_property
    def held(self) -> list[tuple[int, float]]:
        """(step, held-out loss) of evaluations during training, that of the start and that of the end included where they were made."""
        during = {int(e["step"]): float(e["loss"]) for e in self.run.events if e.get("event") == "eval" and e.get("loss") is not None}
        start, end = ((self.entry(key) or {}).get("loss") for key in (f"{self.run.main}_start", self.run.main))
        first = {0: float(start)} if start is not None else {}
        last = {int(self.steps[-1]["step"]): float(end)} if end is not None and self.steps else {}
        return sorted((first | during | last).items())

    @cached_property
    def norms(self) -> list[float]:
        """Norms of the gradients before they were cut."""
        found = [e.get("grad_norm") for e in self.run.events if e.get("event") in ("log", "step")]
        return [float(v) for v in found if v is not None]

    def entry(self, key: str) -> Json | None:
        """An entry of the evaluation."""
        return next((e for e in self.run.evaluation.get("entries") or () if e.get("key") == key), None)

    def setting(self, key: str, default: Any = None) -> Any:
        """A key of the recipe, "training.learning_rate"."""
        section, _, name = key.partition(".")
        return (self.run.settings.get(section) or {}).get(name, default)

    def problem(self, *kinds: str) -> Json | None:
        """The first finding of these kinds of the data check."""
        return next((p for p in self.run.data.get("problems") or () if p.get("kind") in kinds), None)

    def ends(self) -> tuple[float, float] | None:
        """Mean training loss of the first and the last part of the run; None of fewer than WINDOW steps."""
        values = [v for _, v in self.finite]
        if len(values) < WINDOW:
            return None
        part = max(len(values) // WINDOW, 2)
        return sum(values[:part]) / part, sum(values[-part:]) / part


def median(values: Sequence[float]) -> float:
    """The middle one of sorted values, the upper of two.

    >>> median([3.0, 1.0, 2.0])
    2.0
    """
    return sorted(values)[len(values) // 2]


def diagnose(run: Summary) -> list[Cause]:
    """All causes that a run shows, those that make it useless first."""
    from finebits.report.causes import data, memory, training

    case, order = Case(run), ("fail", "warn", "info")
    found = [cause for module in (training, data, memory) for rule in module.RULES if (cause := rule(case)) is not None]
    return sorted(found, key=lambda cause: order.index(cause.sure))
