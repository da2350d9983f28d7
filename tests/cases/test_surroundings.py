"""Where the command runs: its locale, its streams, its user's home."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finebits.cli._recipe import read
from finebits.errors import WrongUse
from finebits.interop.hf import cache

SRC = Path(__file__).parents[2] / "src"
LIST = "import sys; from finebits.cli import main; sys.exit(main())"


def _in_words_of_the_locale(text: str) -> Iterator[ast.Call]:
    """Calls that read or write text in whatever encoding this machine has."""
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        own, name = isinstance(call.func, ast.Attribute), getattr(call.func, "attr", getattr(call.func, "id", ""))
        whose = getattr(getattr(call.func, "value", None), "id", "")
        if any(k.arg == "encoding" for k in call.keywords) or whose in ("os", "files", "ipc", "webbrowser", "Image"):
            continue
        mode = next((k.value for k in call.keywords if k.arg == "mode"), None) or next(iter(call.args[0 if own else 1 :]), None)
        letters = mode.value if isinstance(mode, ast.Constant) else "r"
        opens = name == "open" and isinstance(letters, str) and "b" not in letters and {*letters} <= {*"rwax+t"}
        if opens or (name == "read_text" and not call.args) or (name == "write_text" and own and len(call.args) == 1):
            yield call


def test_no_text_is_read_in_the_encoding_of_the_machine() -> None:
    """'charmap' codec can't decode byte …: what is written as UTF-8 here is read so on Windows too."""
    files = sorted(SRC.rglob("*.py"))
    found = [f"{p.relative_to(SRC)}:{call.lineno}" for p in files for call in _in_words_of_the_locale(p.read_text(encoding="utf-8"))]
    assert not found, found
    assert [*_in_words_of_the_locale("open(p)\np.open('w')\np.read_text()\nopen(p, 'rb')\np.open('ab')")][2].lineno == 3


def _listed(**given: Any) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(SRC)} | given.pop("env", {})
    return subprocess.run([sys.executable, "-c", LIST, "list", "--shape", "init"], env=env, timeout=120, text=True, **given)


def test_a_terminal_that_knows_no_other_letters() -> None:
    done = _listed(env={"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0 and "loftq" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="streams are closed by number")
def test_streams_that_are_closed() -> None:
    def closed() -> None:
        for number in (0, 1, 2):
            os.close(number)

    assert _listed(preexec_fn=closed).returncode == 0


def test_a_value_that_is_longer_than_a_file_s_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is looked whether a word is a file that is there: File name too long."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "once"}')
    assert read(["m", "rows.jsonl", f"made_by={'x' * 300}"], None).data.made_by == "x" * 300


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Containers run as users who are in no list of users; what is named needs no home, and ~ in it is written out."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value, where in (("FINEBITS_HOME", "~/f", "f"), ("XDG_CACHE_HOME", str(tmp_path), "finebits")):
        for other in ("FINEBITS_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        assert cache() == tmp_path / where
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    with pytest.raises(WrongUse, match="no home folder .*: set FINEBITS_HOME"):
        cache()
