"""Progress of long work on stderr: a line that rewrites itself on a terminal, a line now and then elsewhere; and never two silent seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

SILENCE = 1.5  # seconds after which `alive` speaks up
FIRST = 0.4  # for the first time: the process has been silent while it started
STEP = {True: 0.1, False: 10.0}  # seconds between two lines of one piece of work: on a terminal, and elsewhere


class Progress:
    """Call it with (done, total, what); `say` prints a line of its own."""

    def __init__(self, title: str, quiet: bool = False, baseline: int = 0, budget: int | None = None) -> None:
        self.title, self.quiet, self.baseline, self.budget = title, quiet, baseline, budget
        self.live = sys.stderr.isatty()
        self.begun = self.shown = time.monotonic()
        self.at = ""
        self.open = False
        if title and not quiet:
            _at.work = self

    def __call__(self, done: int, total: int, what: str = "") -> None:
        now = time.monotonic()
        last = done >= total
        left = (now - self.begun) / max(done, 1) * (total - done)
        self.at = f"  {done}/{total}  {what}" + ("" if last else f"  {left:.0f} s left")
        if self.quiet or (now - self.shown < STEP[self.live] and not last):
            return
        self._show(f" {self.title}{self.at}", last)

    def say(self, text: str) -> None:
        """One whole line."""
        if self.quiet:
            return
        if self.open:
            print(file=sys.stderr)
            self.open = False
        print(f" {text}", file=sys.stderr, flush=True)
        _at.spoke = time.monotonic()

    def memory(self, e: dict[str, Any]) -> str:
        """What is taken now as the budget counts it: above the process before the model, or on the device."""
        taken = e["device"] if "device" in e else max(e["rss"] - self.baseline, 0)
        return f"{taken / 2**20:.0f}" + (f" of {self.budget / 2**20:.0f}" if self.budget is not None else "") + " MiB"

    def event(self, e: dict[str, Any]) -> None:
        """An event of a training run, as people want to see it."""
        if e["event"] == "step":
            loss = f"loss {e['loss']:.4f}" if "loss" in e else ""
            memory = f"  memory {self.memory(e)}" if "rss" in e else ""
            self(e["step"], e["total"], f"{loss}  lr {e['lr']:.2e}{memory}")
        elif e["event"] in ("phase", "save"):
            self.say(e.get("name") or f"saved at step {e['step']}")

    def beat(self) -> None:
        """Say that the work goes on, and where it is."""
        took = time.monotonic() - self.begun
        self._show(f" {self.title}{self.at}" + (f"  ({took:.0f} s)" if took >= 1 else ""), False)

    def _show(self, text: str, last: bool) -> None:
        self.shown = _at.spoke = time.monotonic()
        if self.live:
            print("\r" + text[:119].ljust(119), end="\n" if last else "", file=sys.stderr, flush=True)
            self.open = not last
        else:
            print(text, file=sys.stderr, flush=True)


class _At:
    """What this process works at, and when it last said something."""

    work: Progress | None = None
    spoke: float = 0.0


_at = _At()


@contextlib.contextmanager
def alive(title: str, at_once: bool = False) -> Iterator[None]:
    """Meanwhile, where nothing was said for SILENCE seconds, a line says what is being done and for how long: long calls into other
    libraries report nothing themselves. `at_once`: it begins with a line, since imports that let no other thread speak come first."""
    _at.spoke, _at.work = time.monotonic() - SILENCE + FIRST, Progress(title)
    if at_once:
        _at.work.beat()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            if _at.work is not None and time.monotonic() - _at.spoke >= SILENCE:
                _at.work.beat()

    thread = threading.Thread(target=watch, name="finebits-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _at.work = None


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Meanwhile another process speaks for this one."""
    before, _at.work = _at.work, None
    try:
        yield
    finally:
        _at.work, _at.spoke = before, time.monotonic()
