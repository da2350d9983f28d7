"""A process of ours: it does not import from the current folder, stops when it is asked to, and ends with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
LIFELINE = "FINEBITS_LIFELINE"  # the number of the reading end of a pipe whose other end the parent holds open
GRACE = 120  # seconds in which an orphan may save
INTERRUPTED = 130


@contextlib.contextmanager
def stoppable(ask: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP calls `ask`. A terminal and a parent may both pass one wish on, so a second signal counts only if it
    is Ctrl-C again, which insists: KeyboardInterrupt. A hang-up that is ignored (nohup) stays ignored. Outside the main thread nothing
    changes.

    >>> with stoppable(lambda: print("asked to stop")):
    ...     signal.raise_signal(signal.SIGINT)
    asked to stop
    """
    asked = False

    def heard(number: int, frame: Any) -> None:
        nonlocal asked
        again, asked = asked, True
        if not again:
            ask()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        kept = [s for s in STOPS if s == signal.SIGINT or signal.getsignal(s) is not signal.SIG_IGN]
        before = {s: signal.signal(s, heard) for s in kept}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def first() -> bool:
    """Is this the only process of a stage, or the first of several? It alone writes and speaks.

    >>> first()
    True
    """
    return os.environ.get("RANK", "0") == "0"


def interrupt() -> None:
    """What `stoppable` calls where there is nothing to finish first."""
    raise KeyboardInterrupt


def run(module: str, arguments: Sequence[str], environment: Mapping[str, str], keep: Sequence[int] = ()) -> int:
    """Run `python -m module` and wait for it; its exit code. A wish to stop is passed on, and the child decides how. `keep` are open files
    that it shares."""
    reading, writing = os.pipe()
    try:
        env = {**environment, LIFELINE: str(reading), "PYTHONSAFEPATH": "1"} | _path(environment)
        child = subprocess.Popen([sys.executable, "-m", module, *arguments], env=env, pass_fds=(reading, *keep))
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                child.send_signal(signal.SIGTERM)
    finally:
        os.close(reading)
        os.close(writing)


def _path(environment: Mapping[str, str]) -> dict[str, str]:
    """PYTHONPATH without its empty entries, each of which is the current folder."""
    entries = environment.get("PYTHONPATH", "").split(os.pathsep)
    return {"PYTHONPATH": os.pathsep.join(e for e in entries if e)} if "PYTHONPATH" in environment else {}


def leave_here() -> None:
    """Forget the current folder as a place of modules, where Python was started so that it is one: by `python -m`, or by an empty entry of
    PYTHONPATH."""
    named = [os.path.abspath(e) for e in os.environ.get("PYTHONPATH", "").split(os.pathsep) if e]
    here = os.getcwd()
    sys.path[:] = [p for p in sys.path if p and (os.path.abspath(p) != here or here in named)]


def tied() -> None:
    """From here on this process ends with the one that started it by `run`: it is asked to stop, and after some grace it is gone."""
    pipe = os.environ.pop(LIFELINE, None)
    if pipe is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG: the kernel asks, even while no thread of Python runs
    threading.Thread(target=_watch, args=(int(pipe),), daemon=True).start()


def _watch(pipe: int) -> None:
    os.read(pipe, 1)  # returns when the last writing end is closed, also if that was before this line
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(INTERRUPTED)
