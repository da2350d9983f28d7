"""Counts and times in Prometheus' text form (version 0.0.4). No adapter is named in them: who reads them need not be who owns these."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

from finebits.serve.engine import Engine

EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds


class Times:
    """A histogram of seconds.

    >>> times = Times()
    >>> times.see(0.02)
    >>> times.lines("t")[1:4]
    ['t_bucket{le="0.01"} 0', 't_bucket{le="0.03"} 1', 't_bucket{le="0.1"} 1']
    """

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(EDGES) + 1), 0.0

    def see(self, seconds: float) -> None:
        self.counts[next((i for i, edge in enumerate(EDGES) if seconds <= edge), len(EDGES))] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        marks = [*map(str, EDGES), "+Inf"]
        buckets = [f'{name}_bucket{{le="{mark}"}} {sum(self.counts[: i + 1])}' for i, mark in enumerate(marks)]
        return [f"# TYPE {name} histogram", *buckets, f"{name}_sum {self.total:.6f}", f"{name}_count {sum(self.counts)}"]


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        self.first, self.whole = Times(), Times()
        self._lock = threading.Lock()

    def answered(self, route: str, status: int) -> None:
        with self._lock:
            self.answers[route, status] += 1

    def text(self, engine: Engine) -> str:
        """All of it, with what the engine counts."""
        with self._lock, engine.lock:
            held, adapters = engine.pool.held(), engine.adapters
            of_adapters = sum(n for owner, n in held.items() if isinstance(owner, int))
            pages = {"free": engine.pool.free, "adapters": of_adapters, "cache": sum(held.values()) - of_adapters}
            resident = sum(e.unit is not None for e in adapters.entries.values())
            lines = ["# TYPE finebits_requests_total counter"]
            lines += [f'finebits_requests_total{{route="{r}",status="{s}"}} {n}' for (r, s), n in sorted(self.answers.items())]
            lines += _lines(
                "counter",
                {
                    "prompt_tokens_total": engine.prompt_tokens,
                    "prompt_tokens_cached_total": engine.prefixes.hits * engine.prefixes.tokens,
                    "generation_tokens_total": engine.tokens,
                    "steps_total": engine.steps,
                    "adapter_loads_total": adapters.loads,
                    "adapter_hits_total": adapters.hits,
                    "adapter_evictions_total": adapters.evictions,
                },
            )
            lines += _lines(
                "gauge",
                {
                    "requests_running": len(engine.running),
                    "requests_waiting": len(engine.waiting),
                    "adapters_registered": len(adapters.entries),
                    "adapters_resident": resident,
                    "page_bytes": engine.pool.page_bytes,
                },
            )
            lines += ["# TYPE finebits_pages gauge", *(f'finebits_pages{{of="{k}"}} {n}' for k, n in pages.items())]
            lines += self.first.lines("finebits_time_to_first_token_seconds") + self.whole.lines("finebits_request_seconds")
        return "\n".join(lines) + "\n"

    def timed(self, first: float | None, whole: float) -> None:
        """Seconds of one answer, to its first token and to its end."""
        with self._lock:
            if first is not None:
                self.first.see(first)
            self.whole.see(whole)


def _lines(kind: str, values: Mapping[str, int]) -> list[str]:
    return [line for k, v in values.items() for line in (f"# TYPE finebits_{k} {kind}", f"finebits_{k} {v}")]
