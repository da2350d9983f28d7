"""A local page of a run that is going: its panels, drawn again as the run's files grow, and above them how it goes by the second.

`/` is the page of the run folder as it stands, `/state` how it goes as JSON, `/events` the same as server-sent events, one whenever something
has changed, until the run has ended. Any number of browsers may look: files are read once for all of them. It answers to 127.0.0.1 and
localhost only and writes nothing.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from finebits.report.page import run_page
from finebits.report.summary import json_of
from finebits.runfolder import EVENTS, MEMORY, PLAN, RUNNING, RUNS, RunFolder
from finebits.serve.listen import until_stopped
from finebits.serve.studio import HOSTS

PACE = 0.5  # seconds between two looks at the files
BEAT = 15.0  # seconds without news after which a browser is told that the connection stands
STEPS = 50  # by so many steps the time that is left is told
WINDOW = 20  # losses that are averaged


@dataclass
class Tail:
    """A file of events that is read as it grows."""

    path: Path
    at: int = 0
    rest: bytes = b""

    def new(self) -> list[dict[str, Any]]:
        """The events since the last call; the file may have begun anew. A line that is not whole yet is left for the next call."""
        try:
            if self.path.stat().st_size < self.at:
                self.at, self.rest = 0, b""
            with self.path.open("rb") as f:
                f.seek(self.at)
                more = f.read()
        except FileNotFoundError:
            return []
        self.at += len(more)
        *lines, self.rest = (self.rest + more).split(b"\n")
        events = []
        for line in lines:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue  # the page of the run names it
        return [e for e in events if isinstance(e, dict)]


@dataclass
class Watch:
    """How the run in a folder goes; asked by many, it looks at the files at most every PACE seconds."""

    folder: Path
    tails: dict[str, Tail] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    looked: float = 0.0
    known: dict[str, Any] = field(default_factory=dict)
    latest: dict[str, Any] = field(default_factory=dict)
    times: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS + 1))
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    drawn: tuple[Any, str] = (None, "")

    def state(self) -> dict[str, Any]:
        """status, run, phase, step, total, loss (the mean over the last steps), memory and budget (bytes), left (seconds of training), and a
        version of what the page shows."""
        with self.lock:
            if time.monotonic() - self.looked >= PACE or not self.known:
                self._look()
                self.looked = time.monotonic()
            return self.known

    def page(self) -> str:
        """The page of the run, drawn again where a file has changed."""
        state = self.state()
        with self.lock:
            if self.drawn[0] != state["version"]:
                self.drawn = state["version"], run_page(self.folder, json.dumps(state))
            return self.drawn[1]

    def _look(self) -> None:
        for path in sorted((self.folder / RUNS).glob(f"*/{EVENTS}")):
            name = path.parent.name
            for event in self.tails.setdefault(name, Tail(path)).new():
                if event.get("t", 0.0) >= self.latest.get("t", 0.0):
                    self._tell(name, event)
        said = self.latest
        left = None
        if said.get("training") and len(self.times) > 1:
            seconds = statistics.median(b - a for a, b in zip(self.times, list(self.times)[1:], strict=False))
            left = max(said["total"] - said["step"], 0) * seconds
        plan = json_of(self.folder / PLAN) or {} if "budget" not in self.known else self.known
        self.known = {
            "status": RunFolder(self.folder).status or "unfinished",
            **{k: said.get(k) for k in ("run", "phase", "step", "total", "memory")},
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "budget": plan.get("budget"),
            "left": left,
            "version": self._version(),
        }

    def _tell(self, run: str, e: dict[str, Any]) -> None:
        """Take in one event."""
        if run != self.latest.get("run"):
            self.latest = {"run": run}
            self.times.clear()
            self.losses.clear()
        self.latest["t"] = e.get("t", 0.0)
        self.latest["baseline"] = e.get("baseline", self.latest.get("baseline"))
        if e.get("event") == "phase":
            self.latest |= {"phase": e.get("name"), "training": e.get("name") == "training"}
            self.times.clear()
        elif e.get("event") == "step":
            self.latest |= {"step": e.get("step", 0), "total": e.get("total", 0), "training": True}
            self.times.append(e.get("t", 0.0))
            self.losses.extend([e["loss"]] if isinstance(e.get("loss"), float) and e["loss"] == e["loss"] else [])
            baseline = self.latest["baseline"]
            if "device" in e or ("rss" in e and baseline is not None):
                self.latest["memory"] = e["device"] if "device" in e else max(e["rss"] - baseline, 0)

    def _version(self) -> str:
        """Changes with every file that the page shows."""
        files = [*self.folder.glob("*.json"), *(self.folder / RUNS).glob(f"*/{EVENTS}"), *(self.folder / RUNS).glob(f"*/{MEMORY}")]
        stamps = [(p.stat().st_mtime_ns, p.stat().st_size) for p in files if p.is_file()]
        return f"{hash(tuple(sorted(stamps))) & (1 << 48) - 1:x}"


def app(folder: Path) -> Starlette:
    """The application. Raises Invalid where the page of the run cannot be drawn."""
    watch = Watch(folder)
    watch.page()

    def page(request: Request) -> Response:
        return HTMLResponse(watch.page(), headers={"Cache-Control": "no-store"})

    def state(request: Request) -> Response:
        return JSONResponse(watch.state(), headers={"Cache-Control": "no-store"})

    async def news() -> AsyncIterator[str]:
        told, quiet = "", 0.0
        while True:
            state = await asyncio.to_thread(watch.state)
            now = json.dumps(state)
            if now != told:
                yield f"data: {now}\n\n"
                told, quiet = now, 0.0
            elif quiet >= BEAT:
                yield ": still here\n\n"
                quiet = 0.0
            if state["status"] != RUNNING:
                return
            await asyncio.sleep(PACE)
            quiet += PACE

    def events(request: Request) -> Response:
        return StreamingResponse(news(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    routes = [Route("/", page), Route("/state", state), Route("/events", events)]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])


def follow(app: Starlette, port: int) -> None:
    """Serve the page of a run until Ctrl-C. Raises WrongUse where nobody can listen at the port."""
    until_stopped(app, HOSTS[0], port, timeout_graceful_shutdown=1)
