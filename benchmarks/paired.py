"""Times of calls that take turns on the CPU, and ratios that hold where other programs run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class Times(NamedTuple):
    """Seconds of one call, turn by turn."""

    hot: list[float]  # one copy of the weight
    cold: list[float]  # copies in turn


def turns(contenders: Sequence[Any], repeats: int, least: float = 0.01) -> dict[str, Times]:
    """Times of each contender (`name`, `calls`: one a copy of the weight); contenders take turns, each lasting `least` or one call.

    Every copy is called once before: what its first call finds out, later ones need not.
    """

    def timed(calls: Iterator[Callable[[], object]], count: int) -> float:
        these = list(itertools.islice(calls, count))
        start = time.perf_counter()
        for call in these:
            call()
        return (time.perf_counter() - start) / count

    found = {c.name: Times([], []) for c in contenders}
    same, others = ({c.name: itertools.cycle(c.calls[:most]) for c in contenders} for most in (1, None))
    for c in contenders:
        for call in c.calls:
            call()
    once = {c.name: min(timed(same[c.name], 1) for _ in range(2)) for c in contenders}
    for _ in range(repeats):
        for c in contenders:
            count = max(1, round(least / once[c.name]))
            timed(same[c.name], 1)
            found[c.name].hot.append(timed(same[c.name], count))
            found[c.name].cold.append(timed(others[c.name], count))
    return found


def ratio(some: Sequence[float], *peers: Sequence[float]) -> float:
    """The median over the turns of a time over the least time of the peers in the same turn."""
    return statistics.median(a / min(b) for a, *b in zip(some, *peers, strict=True))
