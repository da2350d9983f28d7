"""Times of calls on a CUDA device: replayed from a graph (the device's own time) and launched from Python (what eager code meets)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Calls = Sequence[Callable[[], object]]


class Times(NamedTuple):
    """Median seconds of one call."""

    hot: float  # one copy of the weight, from a graph
    cold: float  # copies in turn, from a graph
    call: float  # copies in turn, each launched from Python


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Seconds of one run, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / rounds


def every(calls: Calls) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def recorded(calls: Calls) -> Callable[[], object]:
    """The calls as one graph; as they are where one of them cannot be captured."""
    run, side = every(calls), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles, and gives libraries their workspaces, before anything is captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception as error:
        print(f"not captured, so its times hold launches too: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()
        return run
    return graph.replay


def turns(contenders: Sequence[Any], repeats: int, least: float = 2e-3) -> dict[str, Times]:
    """Times of each contender (`name`, `calls`: one a copy of the weight); contenders take turns, and each turn lasts at least `least`."""
    runs: dict[str, list[tuple[Callable[[], object], int, int]]] = {}
    for c in contenders:
        same = max(1, min(len(c.calls), 16))
        ways = [(recorded([c.calls[0]] * same), same), (recorded(c.calls), len(c.calls)), (every(c.calls), len(c.calls))]
        runs[c.name] = []
        for run, count in ways:
            seconds(run, 1)
            runs[c.name].append((run, count, max(1, round(least / seconds(run, 1)))))
    found: dict[str, list[list[float]]] = {c.name: [[], [], []] for c in contenders}
    for _ in range(repeats):
        for c in contenders:
            for kept, (run, count, rounds) in zip(found[c.name], runs[c.name], strict=True):
                kept.append(seconds(run, rounds) / count)
    return {name: Times(*map(statistics.median, kept)) for name, kept in found.items()}


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.ones(1 << 28, device="cuda")
    b = torch.empty_like(a)
    b.copy_(a)
    time.sleep(0.05)
    return 2 * a.nbytes / min(seconds(lambda: b.copy_(a), 4) for _ in range(8))
