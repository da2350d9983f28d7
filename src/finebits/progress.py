"""Progress of long work on stderr: a line that rewrites itself on a terminal, a line now and then elsewhere; and never two silent seconds."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

SILENCE = 1.5  # seconds after which `alive` speaks up
STEP = {True: 0.1, False: 10.0}  # seconds between two lines of one piece of work: on a terminal, and elsewhere


class Progress:
    """Call it with (done, total, what); `say` prints a line of its own.

    >>> progress = Progress("rows", quiet=True)
    >>> progress(5, 5, "read")
    >>> progress.at
    '  5/5  read'
    """

    def __init__(self, title: str, quiet: bool = False, baseline: int = 0, budget: int | None = None) -> None:
        self.title, self.quiet, self.baseline, self.budget = title, quiet, baseline, budget
        self.live = sys.stderr.isatty()
        self.begun = self.shown = time.monotonic()
        self.at = ""
        self.open = False
        if title and not quiet:
            _at.work = self
            _at.tell(False)

    def __call__(self, done: int, total: int, what: str = "") -> None:
        now = time.monotonic()
        last = done >= total
        left = (now - self.begun) / max(done, 1) * (total - done)
        self.at = f"  {done}/{total}  {what}" + ("" if last else f"  {left:.0f} s left")
        if self.quiet or (now - self.shown < STEP[self.live] and not last):
            _at.tell(False)
            return
        self._show(f" {self.title}{self.at}", last)

    def say(self, text: str) -> None:
        """One whole line."""
        if self.quiet:
            return
        lead = "\n" if self.open else "\r\x1b[K" if self.live else ""  # on a terminal another process may have written there
        self.open = False
        print(f"{lead} {text}", file=sys.stderr, flush=True)
        _at.tell()

    def memory(self, e: dict[str, Any]) -> str:
        """What is taken now as the budget counts it: above the process before the model, or on the device.

        >>> Progress("", baseline=100 << 20, budget=400 << 20).memory({"rss": 150 << 20})
        '50 of 400 MiB'
        """
        used = e["device"] if "device" in e else max(e["rss"] - self.baseline, 0)
        return f"{used / 2**20:.0f}" + (f" of {self.budget / 2**20:.0f}" if self.budget is not None else "") + " MiB"

    def event(self, e: dict[str, Any]) -> None:
        """An event of a training run, as people want to see it."""
        if e["event"] == "step":
            loss = f"loss {e['loss']:.4f}" if "loss" in e else ""
            memory = f"  memory {self.memory(e)}" if "rss" in e else ""
            self(e["step"], e["total"], f"{loss}  lr {e['lr']:.2e}{memory}")
        elif e["event"] == "eval":
            more = "".join(f"  {k} {e[k]:.4f}" for k in ("accuracy", "margin") if k in e)
            self.say(f"evaluation at step {e['step']}: loss {e['loss']:.4f}{more}  (best {e['best']:.4f} at step {e['best_step']})")
        elif e["event"] in ("phase", "save"):
            self.say(e.get("name") or f"saved at step {e['step']}")

    def _show(self, text: str, last: bool) -> None:
        self.shown = time.monotonic()
        if self.live:
            print("\r" + text[:119].ljust(119), end="\n" if last else "", file=sys.stderr, flush=True)
            self.open = not last
        else:
            print(text, file=sys.stderr, flush=True)
        _at.tell()


class _At:
    """What this process works at, and whoever speaks for it when it is silent."""

    work: Progress | None = None
    beat: IO[bytes] | None = None

    def tell(self, spoke: bool = True) -> None:
        """What the work is by now, and whether something was just said."""
        if self.beat is not None:
            words = f"{self.work.begun} {self.work.title}{self.work.at}".replace("\n", " ") if self.work is not None else "0 "
            with contextlib.suppress(OSError):  # it is not there any more
                self.beat.write(f"{spoke:d} {words}\n".encode())


_at = _At()


@contextlib.contextmanager
def alive(title: str, at_once: bool = False) -> Iterator[None]:
    """Meanwhile, where nothing was said for SILENCE seconds, a line says what is being done and for how long: long calls into other
    libraries report nothing themselves. `at_once`: it begins with a line, since imports come first that take long."""
    _at.work = Progress(title)
    if at_once:
        _at.work._show(f" {title}", False)
    with _speaker() as _at.beat:
        _at.tell(at_once)
        try:
            yield
        finally:
            _at.work = _at.beat = None


@contextlib.contextmanager
def _speaker() -> Iterator[IO[bytes] | None]:
    """The input of a process that speaks on our stderr, where that is a file of the system, and the system has room for one more process."""
    program = [
        sys.executable,
        "-I",
        "-S",
        str(Path(__file__).with_name("beat.py")),
        str(SILENCE),
        "live" if sys.stderr.isatty() else "lines",
    ]
    try:
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stderr=sys.stderr.fileno(), bufsize=0)
    except (OSError, io.UnsupportedOperation):
        yield None
        return
    with process:
        try:
            yield process.stdin
        finally:
            with contextlib.suppress(OSError):  # it is not there any more
                assert process.stdin is not None
                process.stdin.close()


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Meanwhile another process speaks for this one."""
    before, _at.work = _at.work, None
    _at.tell(False)
    try:
        yield
    finally:
        _at.work = before
        _at.tell(False)
