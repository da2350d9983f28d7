"""Which adapters are in the pool. Registered is not resident: an adapter is read from its folder when a request is for it, by a thread of its
own while the engine goes on, and leaves the pool when others need its pages and no request uses it, the least recently used first. Beginnings
of prompts leave in the same order, before all adapters those that were never used again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from finebits.errors import Failed, FinebitsError
from finebits.kernels.laid import Resident
from finebits.merging.base import Factors
from finebits.serve.grouped import lay, pages_of
from finebits.serve.pages import Pool
from finebits.serve.prefixes import Age, Prefixes

Read = Callable[[], Mapping[str, Factors]]
STAGED = 4  # adapters that are read and have no pages yet: what is prefetched takes no more memory than these
State = Literal["registered", "loading", "staged", "resident", "failed"]


@dataclass(eq=False)
class Entry:
    """An adapter. `uses` counts its requests, waiting or running; `unit` is where it is in the pool."""

    number: int
    read: Read
    uses: int = 0
    used: int = 0
    pinned: bool = False
    leaving: bool = False
    loading: Future[Mapping[str, Factors]] | None = None
    unit: Resident | None = None
    error: str = ""
    pages: int = 0
    rank: int = 0

    @property
    def age(self) -> Age:
        return Age(True, self.used, 0)

    @property
    def state(self) -> State:
        if self.error:
            return "failed"
        if self.unit is not None:
            return "resident"
        return "registered" if self.loading is None else "staged" if self.loading.done() else "loading"


class Residence:
    """The adapters of an engine. Its methods are called under the engine's lock; only `Entry.read` runs outside."""

    def __init__(self, pool: Pool, prefixes: Prefixes, clock: Iterator[int]) -> None:
        self.pool, self.prefixes = pool, prefixes
        self.entries: dict[int, Entry] = {}
        self.loads = self.evictions = self.hits = 0
        self._numbers, self._clock = itertools.count(1), clock
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    def register(self, read: Read, pinned: bool = False) -> Entry:
        entry = Entry(next(self._numbers), read, pinned=pinned)
        self.entries[entry.number] = entry
        return entry

    def unregister(self, number: int) -> None:
        """No request is let in any more; it is gone with the last of those that are."""
        self.entries[number].leaving = True
        self._leave(self.entries[number])

    def _leave(self, entry: Entry) -> None:
        if entry.leaving and not entry.uses:
            self._evict(entry)
            self.prefixes.forget(entry.number)
            del self.entries[entry.number]

    def use(self, entry: Entry) -> None:
        """A request of it has come."""
        self.hits += entry.unit is not None
        entry.uses += 1

    def release(self, entry: Entry) -> None:
        """One is over."""
        entry.uses -= 1
        entry.used = next(self._clock)
        if not entry.uses and entry.loading is not None:  # nobody waits for what was read
            entry.loading.cancel()
            entry.loading = None
        self._leave(entry)

    def prefetch(self, entries: Iterable[Entry]) -> None:
        """Begin to read those that are not here, while there is room for what is read."""
        staged = [e for e in self.entries.values() if e.loading is not None]
        for entry in entries:
            if len(staged) >= STAGED:
                return
            if entry.state == "registered":
                entry.loading = self._reader.submit(entry.read)
                staged.append(entry)

    def arrived(self, entry: Entry) -> bool:
        """Is it in the pool, or read? Where reading failed, `entry.error` says why."""
        if entry.unit is not None:
            return True
        if entry.loading is None or not entry.loading.done():
            return False
        try:
            factors = entry.loading.result()
        except FinebitsError as e:
            entry.error = str(e)
        except Exception as e:  # of whatever reads files: the others go on
            entry.error = f"the adapter cannot be read ({type(e).__name__}: {' '.join(str(e).split())[:200]})"
        else:
            entry.pages = pages_of(factors, self.pool.elements)
            entry.rank = max(f.rank for f in factors.values())
            if entry.pages > self.pool.count:
                entry.error = f"the adapter takes {entry.pages} pages and the pool has {self.pool.count}: give the server a larger --budget"
        if entry.error:
            entry.loading = None
        return True

    def kept(self, more: Iterable[Entry] = ()) -> int:
        """Pages of adapters that cannot leave while these run."""
        return sum(e.pages for e in {*(e for e in self.entries.values() if e.unit is not None and e.pinned), *more})

    def admit(self, entry: Entry, running: Iterable[Entry]) -> Resident:
        """It is in the pool now. There must be room beside what `running` rows use."""
        if entry.unit is None:
            assert entry.loading is not None
            self.room(entry.pages, {*running, entry})
            entry.unit, entry.loading = lay(entry.loading.result(), self.pool, entry.number), None
            self.loads += 1
        entry.used = next(self._clock)
        return entry.unit

    def room(self, pages: int, running: Iterable[Entry]) -> None:
        """Evict until so many pages are free. Raises RuntimeError where nobody can go: admission has let in too many."""
        if self.pool.free >= pages:
            return
        needed, there = {*running}, [e for e in self.entries.values() if e.unit is not None]
        idle = [*(e for e in there if not e.pinned and e not in needed), *self.prefixes.idle()]
        idle.sort(key=lambda one: one.age, reverse=True)
        while self.pool.free < pages:
            if not idle:
                raise Failed(f"{pages} pages are needed, {self.pool.free} are free, and every adapter in the pool is in use")
            if isinstance(one := idle.pop(), Entry):
                self._evict(one)
                self.evictions += 1
            else:
                self.prefixes.evict(one)

    def _evict(self, entry: Entry) -> None:
        if entry.unit is not None:
            self.pool.give(entry.unit.pages)
            entry.unit = None

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)
