"""What a person sees of long work, also while no thread of the process can speak."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SRC = Path(__file__).parent.parent / "src"
BEGIN = """
import ctypes, time
from finebits import progress
progress.SILENCE = 0.2
hold = ctypes.PyDLL(None).usleep  # like an import, it lets no other thread run
with progress.alive("starting", at_once=True):
"""
HOLDING = """
    hold(2_000_000)
    progress.Progress("pricing")(1, 10, "x")
    hold(500_000)
    with progress.elsewhere():
        time.sleep(0.6)
    progress.Progress("").say("made")
"""
KILLED = """
    hold(2_000_000)
    progress.Progress("pricing")(1, 10, "x")
    import os, signal; os.kill(os.getpid(), signal.SIGKILL)
"""
ASKED = """
    import os, signal, sys
    hold(1_500_000)
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.killpg(0, signal.SIGTERM)
    hold(2_000_000)
    sys.exit(7)
"""
ALONE = """
    from pathlib import Path
    import os, signal, sys
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    time.sleep(0.2)
    progress.Progress("pricing")(1, 10, "x")
    progress.Progress("").say("made")
"""
PIECES = """
    for name in "abcdefghijklmnop":
        progress.Progress(name)
        hold(150_000)
"""


def held(code: str, **more: Any) -> tuple[int, str]:
    """The exit code and what was said, where nobody watches."""
    env = os.environ | {"PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", BEGIN + code], env=env, stderr=subprocess.PIPE, text=True, timeout=120, **more)
    return done.returncode, done.stderr


def watched(code: str) -> tuple[int, str]:
    """The same in a terminal."""
    mine, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", BEGIN + code], env=os.environ | {"PYTHONPATH": str(SRC)}, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(mine, 4096)
            except OSError:  # the other end is closed
                os.close(mine)
                break
    return process.returncode, said.decode()


Runs = dict[str, Future[tuple[int, str]]]
RUNS: dict[str, Callable[[], tuple[int, str]]] = {
    "held": lambda: held(HOLDING),
    "watched": lambda: watched(HOLDING),
    "killed": lambda: held(KILLED),
    "asked": lambda: held(ASKED, start_new_session=True),
    "alone": lambda: held(ALONE),
    "pieces": lambda: held(PIECES),
}


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """All at once: they mostly wait."""
    with ThreadPoolExecutor(len(RUNS)) as pool:
        yield {name: pool.submit(run) for name, run in RUNS.items()}


@pytest.mark.parametrize("name", ["held", "watched"])
def test_work_that_holds_the_lock_is_not_silent(runs: Runs, name: str) -> None:
    code, said = runs[name].result()
    lines = said.replace("\r", "\n").split("\n")
    told = [line.split("  (")[0].rstrip() for line in lines if line.strip()]
    assert code == 0 and told[0] == " starting" and told.count(" starting") >= 2
    assert any(line.startswith(" pricing  1/10") for line in told)
    assert told[-1].endswith(" made")


def test_whoever_speaks_for_a_process_ends_with_it(runs: Runs) -> None:
    assert runs["killed"].result()[0] == -9  # and the pipe of stderr was closed by both, or this had waited for ever


def test_a_wish_to_stop_that_reaches_the_group_is_the_process_s_to_answer(runs: Runs) -> None:
    """As from a terminal or a scheduler: who speaks for the process goes on until it ends, and does not change how."""
    code, said = runs["asked"].result()
    assert code == 7 and said.count(" starting") >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems list children elsewhere")
def test_a_process_whose_speaker_is_gone_goes_on(runs: Runs) -> None:
    code, said = runs["alone"].result()
    assert code == 0 and said.rstrip().endswith("made")


def test_a_new_piece_of_work_has_not_spoken(runs: Runs) -> None:
    """The time since the last line counts, through however many pieces that say nothing themselves."""
    assert len(runs["pieces"].result()[1].splitlines()) >= 3
