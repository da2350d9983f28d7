"""Continuous batching over one base: every step is one forward pass of all running requests, whatever adapters they are for.

S-LoRA: Serving Thousands of Concurrent LoRA Adapters.  Sheng et al., MLSys 2024.  arXiv:2311.03285v3, with the batching by iteration of Orca
(Yu et al., OSDI 2022). A step lets in whoever fits, gives every request a token, and lets out whoever is through.

Beginnings of prompts that others of the same adapter had are not computed again (serve/prefixes.py).

Deviations: what is left of a prompt is taken whole, so that every running request gets a token in every step and the peak that admission
computes is the one that comes; adapters are not clustered: requests come in the order that they arrived in, but for those whose adapter is still
being read.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from finebits.errors import Invalid
from finebits.kernels.laid import Group, Groups
from finebits.serve.attention import Begun, Cache, Step
from finebits.serve.grouped import Hooks, now
from finebits.serve.pages import Pool, paging
from finebits.serve.prefixes import Block, Prefixes
from finebits.serve.requests import Busy, Reason, Request, Token, TooLong, chosen, peak
from finebits.serve.residence import Entry, Read, Residence

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]  # ids (1, t), positions (1, t), last tokens (r,) -> logits (r, vocabulary)
SHARE = 0.3  # of the newest in a moving mean


@dataclass(frozen=True)
class Base:
    """What is served: the forward pass of a model in the attention of `serve.attention`, its linear layers that an adapter may lie over, the
    (heads, width) of the keys of every layer, how long a text may be, how many tokens there are, and the model that holds all that."""

    forward: Forward
    linears: Mapping[str, nn.Linear]
    layers: Sequence[tuple[int, int]]
    longest: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: Any = None


@dataclass(frozen=True)
class Limits:
    """Of an engine: bytes of its pool, requests that wait, requests in a step, tokens of prompts in one (a longer prompt comes alone), and
    whether beginnings of prompts are kept for those that begin alike."""

    budget: int = 1 << 30
    max_queue: int = 256
    max_batch: int = 32
    max_prefill: int = 2048
    prefixes: bool = True


@dataclass(eq=False)
class Row:
    """A running request: its tokens that are kept (`length`), its pages by layer and block, the token that goes in next. `shared` are blocks of
    its prompt that others may run over too; `pages` are its own."""

    request: Request
    entry: Entry | None
    gen: Generator | None
    table: Tensor
    shared: list[Block] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    length: int = 0
    made: int = 0
    last: int = -1

    @property
    def fresh(self) -> list[int]:
        return [self.last] if self.made else list(self.request.prompt[self.length :])

    @property
    def left(self) -> int:
        return self.request.sampling.max_tokens - self.made


class Engine:
    """`submit` from any thread; `step` from one. Nothing is in two places: a request is waiting, running or over."""

    def __init__(self, base: Base, limits: Limits) -> None:
        self.base, self.limits = base, limits
        tokens, elements = paging(base.layers, max((max(linear.weight.shape) for linear in base.linears.values()), default=1))
        count = limits.budget // (elements * base.dtype.itemsize)
        if count < 2 * len(base.layers):
            raise Invalid(
                f"a budget of {limits.budget:,} bytes holds {count} pages, and one request takes at least {len(base.layers)}: give --budget "
                f"{4 * len(base.layers) * elements * base.dtype.itemsize:,} or more"
            )
        self.pool = Pool(count, elements, base.dtype, base.device)
        self.cache = Cache(self.pool, tokens, list(base.layers))
        clock = itertools.count(1)
        self.prefixes = Prefixes(self.pool, tokens, clock)
        self.adapters = Residence(self.pool, self.prefixes, clock)
        self.hooks = Hooks(base.linears)
        self.lock = threading.RLock()
        self.waiting: deque[Request] = deque()
        self.running: list[Row] = []
        self.steps = self.prompt_tokens = self.tokens = 0
        self.closed = False
        self._service = 1.0  # seconds that a request takes once it runs, a moving mean

    # adapters ---------------------------------------------------------------------------------------------------------------------------------

    def register(self, read: Read, pinned: bool = False) -> int:
        """The number of an adapter that `read` gives when it is needed."""
        with self.lock:
            return self.adapters.register(read, pinned).number

    def unregister(self, number: int) -> None:
        with self.lock:
            self.adapters.unregister(number)

    # requests ---------------------------------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue. Raises Busy where that is full, ValueError where the request could never run."""
        if not request.prompt:
            raise Invalid("the prompt is empty: give at least one token")
        if bad := [i for i in request.prompt if not 0 <= i < self.base.vocabulary]:
            raise Invalid(f"the prompt holds the token {bad[0]}, and this model has the tokens 0 to {self.base.vocabulary - 1}")
        total = len(request.prompt) + request.sampling.max_tokens
        if total > self.base.longest:
            raise TooLong(
                f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.sampling.max_tokens}, and this model has room for "
                f"{self.base.longest} together"
            )
        with self.lock:
            if self.closed:
                raise Busy("the server is going down", 5)
            entry = self._entry(request)
            if self.cache.pages(total) + (entry.pages if entry else 0) > self.pool.count:
                raise Invalid(
                    f"a request of {total} tokens takes {self.cache.pages(total)} pages and the pool has {self.pool.count}: ask for fewer "
                    "tokens, or give the server a larger --budget"
                )
            if len(self.waiting) >= self.limits.max_queue:
                rounds = math.ceil(len(self.waiting) / self.limits.max_batch)
                raise Busy(
                    f"{len(self.waiting)} requests wait already, and this server lets no more: try again", math.ceil(self._service * rounds)
                )
            if entry is not None:
                self.adapters.use(entry)
            request.arrived = time.monotonic()
            self.waiting.append(request)
            self.adapters.prefetch([entry] if entry is not None else [])

    def _entry(self, request: Request) -> Entry | None:
        if request.adapter is None:
            return None
        entry = self.adapters.entries.get(request.adapter)
        if entry is None or entry.leaving:
            raise Invalid("the adapter of this request was unloaded")
        if entry.error:
            raise Invalid(entry.error)
        return entry

    def abort(self, request: Request) -> None:
        """It ends in the next step, and its pages are free then."""
        request.aborted = True

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def close(self) -> None:
        """Nothing more is let in; what is in goes on."""
        with self.lock:
            self.closed = True

    def stop(self) -> None:
        """End whatever is left, and take the hooks off the model."""
        self.close()
        with self.lock:
            for row in list(self.running):
                self._over(row, "abort")
            while self.waiting:
                self._drop(self.waiting.popleft(), "abort")
            self.adapters.close()
            self.hooks.remove()

    # a step -----------------------------------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One forward pass. False where there was nothing to run (requests may wait for their adapters)."""
        with self.lock:
            for row in [row for row in self.running if row.request.aborted]:
                self._over(row, "abort")
            self._admit()
            rows = sorted(self.running, key=lambda row: row.entry.number if row.entry else 0)
            if not rows:
                return False
            entries = self._entries()
            try:
                for row in rows:
                    self._grow(row, entries)
                step, ids, positions, last = self._laid_out(rows)
            except Exception as e:
                self._failed(rows, e)
                return True
        try:
            now.step = step
            with torch.no_grad():
                logits = self.base.forward(ids, positions, last).float().cpu()
            tokens = self._choose(rows, logits)
        except Exception as e:  # of a model: the engine goes on
            with self.lock:
                self._failed(rows, e)
            return True
        finally:
            now.step = None
        self._deliver(rows, tokens)
        return True

    def _entries(self) -> set[Entry]:
        return {row.entry for row in self.running if row.entry is not None}

    def _admit(self) -> None:
        """Whoever has arrived first comes first, but for those whose adapter is not read yet."""
        prompts, blocked = 0, False
        for _ in range(len(self.waiting)):  # whoever stays goes to the end, so that the order is what it was
            request = self.waiting.popleft()
            if request.aborted:
                self._drop(request, "abort")
                continue
            entry = self.adapters.entries[request.adapter] if request.adapter is not None else None
            if not blocked and (entry is None or self.adapters.arrived(entry)):
                if entry is not None and entry.error:
                    self._drop(request, "refused", entry.error)
                    continue
                if self._has_room(request, entry, prompts):
                    try:
                        prompts += len(self._start(request, entry).fresh)
                    except Exception as e:  # of one request: the others go on
                        self._drop(request, "error", f"the request could not begin ({type(e).__name__}: {' '.join(str(e).split())[:200]})")
                    continue
                if not self.running and not prompts:  # alone, with no adapter in its way but its own: it never will
                    self._drop(request, "refused", "the request and its adapter take more pages together than the pool has")
                    continue
                blocked = True
            self.waiting.append(request)
        wanted = (self.adapters.entries[r.adapter] for r in self.waiting if r.adapter is not None)
        self.adapters.prefetch(wanted)

    def _has_room(self, request: Request, entry: Entry | None, prompts: int) -> bool:
        if len(self.running) >= self.limits.max_batch or prompts and prompts + len(request.prompt) > self.limits.max_prefill:
            return False
        rows = [(max(row.length, len(row.request.prompt)), row.left) for row in self.running]  # shared pages count for each: never too few
        rows.append((len(request.prompt), request.sampling.max_tokens))
        entries = self._entries() | ({entry} if entry is not None else set())
        return peak(rows, self.cache.pages) + self.adapters.kept(entries) <= self.pool.count

    def _start(self, request: Request, entry: Entry | None) -> Row:
        if entry is not None:
            self.hooks.cover(self.adapters.admit(entry, self._entries()).at)
        gen = None
        if request.sampling.temperature > 0:
            gen = Generator()
            gen.manual_seed(request.sampling.seed) if request.sampling.seed is not None else gen.seed()
        most = self.cache.blocks(len(request.prompt) + request.sampling.max_tokens)
        row = Row(request, entry, gen, torch.zeros(len(self.base.layers), most, dtype=torch.long))
        if self.limits.prefixes:
            row.shared = self.prefixes.found(request.adapter, request.prompt)
            for i, block in enumerate(row.shared):
                row.table[:, i] = torch.tensor(block.pages)
            row.length = len(row.shared) * self.cache.tokens
        self.running.append(row)
        return row

    def _grow(self, row: Row, entries: set[Entry]) -> None:
        """Pages for what comes in this step."""
        layers = len(self.base.layers)
        have, want = len(row.shared) + len(row.pages) // layers, self.cache.blocks(row.length + len(row.fresh))
        if want > have:
            self.adapters.room((want - have) * layers, entries)
            new = self.pool.take((want - have) * layers, row)
            row.table[:, have:want] = torch.tensor(new).view(layers, -1)
            row.pages += new

    def _laid_out(self, rows: list[Row]) -> tuple[Step, Tensor, Tensor, Tensor]:
        """(the step, ids, positions, places of the last tokens) of these rows."""
        device, size, fresh = self.base.device, self.cache.tokens, [row.fresh for row in rows]
        starts = [0]
        for tokens in fresh:
            starts.append(starts[-1] + len(tokens))
        positions = torch.cat([torch.arange(row.length, row.length + len(tokens)) for row, tokens in zip(rows, fresh, strict=True)])
        pages = torch.cat([row.table[:, positions[a:b] // size] for row, a, b in zip(rows, starts, starts[1:], strict=False)], 1)
        old = [(row, starts[i]) for i, row in enumerate(rows) if row.made]
        blocks = max((self.cache.blocks(row.length + 1) for row, _ in old), default=0)
        tables = torch.zeros(len(self.base.layers), len(old), blocks, dtype=torch.long)
        for i, (row, _) in enumerate(old):
            n = min(blocks, row.table.shape[1])
            tables[:, i, :n] = row.table[:, :n]
        step = Step(
            self.cache,
            pages.to(device),
            (positions % size).to(device),
            [Begun(starts[i], starts[i + 1], row.table[:, : len(row.shared)].to(device)) for i, row in enumerate(rows) if not row.made],
            torch.tensor([at for _, at in old], dtype=torch.long, device=device),
            tables.to(device),
            torch.tensor([row.length + 1 for row, _ in old], dtype=torch.long, device=device),
            _groups(rows, [len(tokens) for tokens in fresh]),
        )
        ids = torch.tensor([[t for tokens in fresh for t in tokens]], device=device)
        return step, ids, positions[None].to(device), torch.tensor(starts[1:], device=device) - 1

    def _choose(self, rows: list[Row], logits: Tensor) -> list[Token | None]:
        """A token of every row; None where the model gave no numbers."""
        finite = torch.isfinite(logits).all(1).tolist()
        likeliest = logits.argmax(1).tolist()
        tokens: list[Token | None] = []
        for i, row in enumerate(rows):
            sampling = row.request.sampling
            plain = sampling.temperature == 0 and sampling.logprobs is None
            token = Token(likeliest[i]) if plain else chosen(logits[i], sampling, row.gen) if finite[i] else None
            tokens.append(token if finite[i] else None)
        return tokens

    def _deliver(self, rows: list[Row], tokens: list[Token | None]) -> None:
        self.steps += 1
        for row, token in zip(rows, tokens, strict=True):
            begins = not row.made
            self.prompt_tokens += len(row.request.prompt) if begins else 0
            row.length += len(row.fresh)
            if token is None:
                bad: tuple[Reason, str] = ("error", "its weights overflow") if row.entry is None else ("refused", "its adapter overflows")
                with self.lock:
                    self._over(row, bad[0], f"the model gave NaN or Inf for this request: {bad[1]}", scrub=True)
                continue
            row.last, row.made = token.id, row.made + 1
            self.tokens += 1
            if begins and self.limits.prefixes:
                with self.lock:
                    self._share(row)
            if token.id in row.request.sampling.stops:
                reason: Reason | None = "stop"
            else:
                try:
                    ended = row.request.token(token)
                except Exception as e:  # of whoever asked: the others go on
                    with self.lock:
                        self._over(row, "error", f"{type(e).__name__}: {e}")
                    continue
                reason = "stop" if ended else "length" if row.left < 1 else None
            if reason is not None:
                with self.lock:
                    self._over(row, reason)

    def _share(self, row: Row) -> None:
        """The whole blocks of a prompt that has been computed are there for others."""
        size, prompt = self.cache.tokens, row.request.prompt
        for i in range(len(row.shared), len(prompt) // size):
            pages = row.table[:, i].tolist()
            block, new = self.prefixes.keep(row.request.adapter, row.shared, prompt[i * size : (i + 1) * size], pages)
            row.shared.append(block)
            gone = set(pages)
            row.pages = [page for page in row.pages if page not in gone]
            if not new:
                row.table[:, i] = torch.tensor(block.pages)

    def _failed(self, rows: list[Row], error: Exception) -> None:
        for row in rows:
            self._over(row, "error", f"the model failed in this step ({type(error).__name__}: {' '.join(str(error).split())[:200]})", True)

    def _over(self, row: Row, reason: Reason, error: str = "", scrub: bool = False) -> None:
        self.running.remove(row)
        if scrub:
            self.pool.scrub(row.pages)
        self.pool.give(row.pages)
        self.prefixes.release(row.shared)
        row.pages, row.shared = [], []
        self._service += SHARE * (time.monotonic() - row.request.arrived - self._service)
        self._drop(row.request, reason, error)

    def _drop(self, request: Request, reason: Reason, error: str = "") -> None:
        if request.adapter is not None:
            self.adapters.release(self.adapters.entries[request.adapter])
        with contextlib.suppress(Exception):  # of whoever asked, who may be gone: the others go on
            request.end(reason, error)


def _groups(rows: Sequence[Row], sizes: Sequence[int]) -> Groups:
    """Runs of rows of one adapter, over so many places each."""
    groups = Groups()
    at = 0
    for row, size in zip(rows, sizes, strict=True):
        unit = row.entry.unit if row.entry is not None else None
        if groups and groups[-1].adapter is unit:
            groups[-1] = groups[-1]._replace(stop=at + size)
        else:
            groups.append(Group(at, at + size, unit))
        at += size
    return groups
