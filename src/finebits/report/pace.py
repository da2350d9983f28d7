"""How fast a run trained, by its events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finebits.report.cells import Json


@dataclass(frozen=True)
class Pace:
    """Optimizer steps and the seconds that they took, evaluations and pauses between two sessions left out. `tokens` are those of the rows
    (padding is none), None where the events do not count them; `trained` those that the loss is on.

    >>> events = [{"event": "phase", "t": 0.0, "name": "training"}, {"event": "step", "t": 2.0, "tokens": 30, "seen": 100}]
    >>> pace = Pace.of([*events, {"event": "step", "t": 4.0, "tokens": 50, "seen": 100}])
    >>> pace.steps, pace.seconds, pace.per_second(pace.tokens), pace.per_second(pace.trained)
    (2, 4.0, 50.0, 20.0)
    """

    steps: int = 0
    seconds: float = 0.0
    tokens: float | None = None
    trained: float = 0.0

    @classmethod
    def of(cls, events: Iterable[Json]) -> Pace:
        """That of a run. A step counts from the event before it, so one that was killed half way costs nothing."""
        steps, seconds, tokens, trained, counted, before = 0, 0.0, 0.0, 0.0, True, None
        for event in events:
            if event.get("event") == "step" and before is not None:
                steps += 1
                seconds += max(event["t"] - before, 0.0)
                trained += event.get("tokens", 0.0)
                tokens += event.get("seen", 0.0)
                counted &= "seen" in event
            before = event.get("t")
        return cls(steps, seconds, tokens if steps and counted else None, trained)

    def per_second(self, of: float | None) -> float | None:
        """So many in a second; None where that is not known.

        >>> Pace().per_second(None) is None
        True
        """
        return None if of is None or not self.seconds else of / self.seconds

    def to_json(self) -> dict[str, float | int | None]:
        """For the record of a run."""
        rates = {"tokens_per_second": self.per_second(self.tokens), "trained_tokens_per_second": self.per_second(self.trained)}
        return {"steps": self.steps, "seconds": self.seconds, **rates}
