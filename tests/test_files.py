"""What is written is whole or not there."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from finebits import files


def test_text_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "one")
    files.write_text(path, "two")
    assert path.read_text() == "two" and os.listdir(path.parent) == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_an_interrupted_text_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "one")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "two")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("platform", ["linux", "other"])
def test_a_folder_takes_its_place_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    place = tmp_path / "run"
    for text in ("one", "two"):
        with files.folder(place) as new:
            (new / "a.txt").write_text(text)
            assert not place.exists() or (place / "a.txt").read_text() == "one"
    assert (place / "a.txt").read_text() == "two" and os.listdir(tmp_path) == ["run"]
    assert stat.S_IMODE(place.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    place = tmp_path / "run"
    with files.folder(place) as new:
        (new / "a.txt").write_text("one")
    with pytest.raises(error), files.folder(place) as new:
        (new / "a.txt").write_text("two")
        raise error
    assert (place / "a.txt").read_text() == "one" and os.listdir(tmp_path) == ["run"]


def test_a_failed_last_step_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, replace = tmp_path / "run", os.replace
    with files.folder(place) as new:
        (new / "a.txt").write_text("one")

    def fail(source: os.PathLike, target: os.PathLike) -> None:
        if Path(target) == place and Path(source).name != "old":
            raise OSError("no space")
        replace(source, target)

    monkeypatch.setattr(sys, "platform", "other")  # where two folders cannot be swapped in one step
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"), files.folder(place) as new:
        (new / "a.txt").write_text("two")
    assert (place / "a.txt").read_text() == "one" and os.listdir(tmp_path) == ["run"]
