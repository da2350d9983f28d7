"""A process of ours stops when it is asked to, ends with its parent, and imports nothing from the current folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finebits import process

SRC = str(Path(process.__file__).parents[1])
CHILD = """
import os, random, sys, time
from pathlib import Path
from finebits.process import interrupt, stoppable, tied
out, platform = Path(sys.argv[1]), sys.argv[2]
sys.platform = platform
with stoppable(interrupt):
    tied()
    try:
        (out / "pid").write_text(f"{os.getpid()} {random.__file__}")
        time.sleep(60)
    except KeyboardInterrupt:
        (out / "saved").write_text("")
        time.sleep(0.5)  # in which a parent or a terminal may ask again
        sys.exit(130)
"""
PARENT = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may be ignored out here
from finebits.process import interrupt, run, stoppable
with stoppable(interrupt):
    sys.exit(run("a_child_of_ours", sys.argv[1:], os.environ))
"""


@pytest.fixture
def pair(tmp_path: Path) -> object:
    """A parent, and the number of its child; they stand in a folder with a random.py."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "a_child_of_ours.py").write_text(CHILD)
    (tmp_path / "random.py").write_text("raise SystemExit('imported from the current folder')")
    begun: list[subprocess.Popen] = []

    def begin(platform: str) -> tuple[subprocess.Popen, int]:
        path = os.pathsep.join(["", str(tmp_path / "modules"), SRC])  # the empty entry is the current folder
        command = [sys.executable, "-P", "-c", PARENT, str(tmp_path), platform]
        begun.append(subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}))
        wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        number, _, where = (tmp_path / "pid").read_text().partition(" ")
        assert Path(where).parent != tmp_path
        return begun[0], int(number)

    yield begin
    for parent in begun:
        parent.kill()
        parent.wait()


def wait(until: object) -> None:
    end = time.monotonic() + 60
    while not until():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(number: int) -> bool:
    """Has the process ended? One that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_wish_to_stop_is_passed_on_and_the_child_saves(pair, sent: signal.Signals, tmp_path: Path) -> None:
    parent, child = pair(sys.platform)
    parent.send_signal(sent)
    assert parent.wait(60) == process.INTERRUPTED and (tmp_path / "saved").exists() and gone(child)


@pytest.mark.parametrize("platform", ["linux", "other"])
def test_a_child_ends_with_a_killed_parent_and_saves(pair, platform: str, tmp_path: Path) -> None:
    parent, child = pair(platform)  # by the kernel's word, and by the pipe alone
    parent.kill()
    wait(lambda: gone(child))
    assert (tmp_path / "saved").exists()


def test_a_second_signal_insists_only_if_it_is_the_interrupt() -> None:
    asked, before = [], [signal.getsignal(s) for s in process.STOPS]
    with process.stoppable(lambda: asked.append(1)):
        for s in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(s)
        assert asked == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(s) for s in process.STOPS] == before
    with process.stoppable(process.interrupt), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process.stoppable(process.interrupt):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_does_not_import_from_the_current_folder(tmp_path: Path) -> None:
    for name in ("yaml", "json", "torch", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_text("")
    for way in (["-m", "finebits"], ["-c", "import sys; from finebits.__main__ import main; sys.exit(main())"]):
        path = os.pathsep.join([SRC, "", str(tmp_path / "elsewhere")])
        command = [sys.executable, *way, "recipe", "validate", "nothing.yaml"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 2 and "nothing.yaml" in done.stderr, done.stderr


def test_folders_that_were_named_stay_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), "/elsewhere"])
    monkeypatch.setenv("PYTHONPATH", ":/elsewhere")
    process.leave_here()
    assert sys.path == ["/elsewhere"]
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), "/elsewhere"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process.leave_here()
    assert sys.path == [str(tmp_path), "/elsewhere"]
