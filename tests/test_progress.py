"""What a person sees of long work, also while no thread of the process can speak."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
WORK = """
import ctypes, time
from finebits import progress
progress.SILENCE = 0.2
hold = ctypes.PyDLL(None).usleep  # like an import, it lets no other thread run
with progress.alive("starting", at_once=True):
    hold(2_000_000)
    progress.Progress("pricing")(1, 10, "x")
    hold(500_000)
    with progress.elsewhere():
        time.sleep(0.6)
    progress.Progress("").say("made")
"""


def shown(live: bool) -> str:
    env = os.environ | {"PYTHONPATH": str(SRC)}
    if not live:
        return subprocess.run([sys.executable, "-c", WORK], env=env, stderr=subprocess.PIPE, text=True, check=True).stderr
    mine, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", WORK], env=env, stderr=theirs):
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(mine, 4096)
            except OSError:  # the other end is closed
                os.close(mine)
                return said.decode()


@pytest.mark.parametrize("live", [False, True])
def test_work_that_holds_the_lock_is_not_silent(live: bool) -> None:
    lines = shown(live).replace("\r", "\n").split("\n")
    told = [line.split("  (")[0].rstrip() for line in lines if line.strip()]
    assert told[0] == " starting" and told.count(" starting") >= 2
    assert any(line.startswith(" pricing  1/10") for line in told)
    assert told[-1].endswith(" made")


def test_whoever_speaks_for_a_process_ends_with_it() -> None:
    code = WORK.split("    hold(500")[0] + "    import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SRC)}, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == -9  # and the pipe of stderr was closed by both, or this had waited for ever


def test_a_wish_to_stop_that_reaches_the_group_is_the_process_s_to_answer() -> None:
    """As from a terminal or a scheduler: who speaks for the process goes on until it ends, and does not change how."""
    code = (
        WORK.split("    hold(2")[0]
        + """
    import os, signal, sys
    hold(1_500_000)
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.killpg(0, signal.SIGTERM)
    hold(2_000_000)
    sys.exit(7)
"""
    )
    env = os.environ | {"PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True, timeout=120)
    assert done.returncode == 7 and done.stderr.count(" starting") >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems list children elsewhere")
def test_a_process_whose_speaker_is_gone_goes_on() -> None:
    code = (
        WORK.split("    hold(2")[0]
        + """
    from pathlib import Path
    import os, signal, sys
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    time.sleep(0.2)
    progress.Progress("pricing")(1, 10, "x")
    progress.Progress("").say("made")
"""
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SRC)}, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr.rstrip().endswith("made")


def test_a_new_piece_of_work_has_not_spoken() -> None:
    """The time since the last line counts, through however many pieces that say nothing themselves."""
    code = (
        WORK.split("    hold(2")[0]
        + """
    for name in "abcdefghijklmnop":
        progress.Progress(name)
        hold(150_000)
"""
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SRC)}, stderr=subprocess.PIPE, text=True)
    assert len(done.stderr.splitlines()) >= 3
