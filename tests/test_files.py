"""What is written is whole or not there, and what others wrote stays."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from finebits import artefacts, files

KIND = "test.kind/1"


def fill(place: Path, kind: str = KIND, overwrite: bool = False, **texts: str) -> None:
    """An artefact of text files; `base__a` is the file base/a."""
    with artefacts.folder(place, kind, overwrite) as new:
        for name, text in texts.items():
            files.write_text(new / name.replace("__", "/"), text)
        artefacts.record(new, kind)


def held(place: Path) -> dict[str, str]:
    return {p.relative_to(place).as_posix(): p.read_text() for p in place.rglob("*") if p.is_file() and p.name != artefacts.RECORD}


# One file -------------------------------------------------------------------------------------------------------------------------------


def test_text_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    path.chmod(0o640)
    files.write_text(path, "two")
    assert path.read_text() == "two" and os.listdir(path.parent) == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_interrupted_text_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "one")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "two")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    script = f"""
import os
from pathlib import Path
from finebits import artefacts, files
os.replace = lambda *a: os.kill(os.getpid(), 9)
files.write_text(Path({str(tmp_path / "a")!r}), "x")
"""
    assert python(script).returncode == -9 and len(os.listdir(tmp_path)) == 1
    files.write_text(tmp_path / "a", "y")
    assert os.listdir(tmp_path) == ["a"]


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a").write_text("old")
    (tmp_path / "a").symlink_to(tmp_path / "far" / "a")
    files.write_text(tmp_path / "a", "one")
    (tmp_path / "place").symlink_to(tmp_path / "far" / "deep", target_is_directory=True)  # which is not there yet
    fill(tmp_path / "place", b="two", c="three")
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "far" / "deep" / "c").rename(elsewhere)
    (tmp_path / "far" / "deep" / "c").symlink_to(elsewhere)
    fill(tmp_path / "place", b="four", c="five")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "far" / "a").read_text() == "one"
    assert (tmp_path / "place").is_symlink() and (tmp_path / "far" / "deep" / "b").read_text() == "four"
    assert (tmp_path / "place" / "c").is_symlink() and elsewhere.read_text() == "five"


def test_a_link_to_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far, replace = tmp_path / "far", os.replace
    fill(tmp_path / "place", a="one")
    (tmp_path / "place" / "a").rename(far)
    (tmp_path / "place" / "a").symlink_to(far)

    def other_disk(source: Path, target: Path) -> None:
        if Path(target) == far and Path(source).parent != far.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", other_disk)
    fill(tmp_path / "place", a="two")
    assert far.read_text() == "two" and sorted(os.listdir(tmp_path)) == ["far", "place"]


# A folder -------------------------------------------------------------------------------------------------------------------------------


def test_a_folder_takes_its_place_when_it_is_complete(tmp_path: Path) -> None:
    place = tmp_path / "run"
    fill(place, a="one", base__b="only once")
    with artefacts.folder(place, KIND) as new:
        files.write_text(new / "a", "two")
        assert (place / "a").read_text() == "one"
        artefacts.record(new, KIND)
    assert held(place) == {"a": "two"} and os.listdir(tmp_path) == ["run"]
    assert sorted(os.listdir(place)) == ["a", artefacts.RECORD], "what the old artefact had more is gone, its empty folder too"
    assert artefacts.intact(place)
    (place / "a").write_text("damaged")
    assert not artefacts.intact(place)


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    (tmp_path / "thesis.txt").write_text("three years")
    for text in ("one", "two"):
        fill(tmp_path, a=text, base__b=text)
        (tmp_path / "base" / "notes").write_text("mine")
    fill(tmp_path, a="three")
    artefacts.remove(tmp_path)
    assert held(tmp_path) == {".git/HEAD": "ref", "thesis.txt": "three years", "base/notes": "mine"}


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"README": "mine"}, "holds a README that finebits did not write"),
        ({"config.json": "{}"}, "holds a model that finebits did not write there"),
        ({"model.safetensors": "x"}, "holds a model that finebits did not write there"),
    ],
)
def test_what_others_wrote_is_replaced_when_asked_alone(there: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in there.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(files.Occupied, match=said):
        fill(tmp_path, README="ours")
    assert held(tmp_path) == there
    fill(tmp_path, overwrite=True, README="ours")
    assert held(tmp_path) == ({"README": "ours"} | there if "config.json" in there else {"README": "ours"})


def test_an_artefact_of_another_kind_is_replaced_when_asked_alone(tmp_path: Path) -> None:
    fill(tmp_path, a="one", b="one")
    with pytest.raises(files.Occupied, match="another kind"):
        fill(tmp_path, kind="other/1", a="two")
    fill(tmp_path, kind="other/1", overwrite=True, a="two")
    assert held(tmp_path) == {"a": "two"}


def test_a_record_of_a_stranger_reaches_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    place = tmp_path / "place"
    place.mkdir()
    (place / artefacts.RECORD).write_text(f'{{"schema": "{KIND}", "sha256": {{"../precious": "0", "{tmp_path}/precious": "0"}}}}')
    fill(place, overwrite=True, a="one")
    artefacts.remove(place)
    assert held(tmp_path) == {"precious": "mine"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    place = tmp_path / "run"
    with pytest.raises(error), artefacts.folder(place, KIND):
        raise error
    assert not os.listdir(tmp_path)
    fill(place, a="one")
    with pytest.raises(error), artefacts.folder(place, KIND) as new:
        files.write_text(new / "a", "two")
        raise error
    assert held(place) == {"a": "one"} and not (place / artefacts.STAGE).exists()


def python(script: str) -> subprocess.CompletedProcess[str]:
    src = str(Path(files.__file__).parents[1])
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": src})


@pytest.mark.parametrize("at", range(7))
def test_a_kill_at_any_move_leaves_the_old_or_the_new(at: int, tmp_path: Path) -> None:
    """Killed at the n-th rename of a save: after `settle` the folder is one of the two, and nothing else is in it."""
    fill(tmp_path, a="one", base__b="one", old="one")
    (tmp_path / "mine").write_text("mine")
    script = f"""
import os
from pathlib import Path
from finebits import artefacts, files
replace, left = os.replace, [{at}]
def killing(*a):
    if not left[0]:
        os.kill(os.getpid(), 9)
    left[0] -= 1
    replace(*a)
with artefacts.folder(Path({str(tmp_path)!r}), {KIND!r}) as new:
    (new / "base").mkdir()
    for name in ("a", "base/b", "c"):
        (new / name).write_text("two")
    artefacts.record(new, {KIND!r})
    os.replace = killing
"""
    assert python(script).returncode == (-9 if at < 5 else 0)  # the list of moves, then four files
    artefacts.settle(tmp_path)
    old, new = {"a": "one", "base/b": "one", "old": "one"}, {"a": "two", "base/b": "two", "c": "two"}
    if at:
        assert held(tmp_path) == new | {"mine": "mine"} and not (tmp_path / artefacts.STAGE).exists()
    else:
        assert {k: v for k, v in held(tmp_path).items() if not k.startswith(artefacts.STAGE)} == old | {"mine": "mine"}
    fill(tmp_path, a="three")
    assert held(tmp_path) == {"a": "three", "mine": "mine"}


def test_two_saves_into_one_folder(tmp_path: Path) -> None:
    with artefacts.folder(tmp_path, KIND) as new:
        with pytest.raises(files.Occupied, match="another process"):
            fill(tmp_path, a="two")
        files.write_text(new / "a", "one")
        artefacts.record(new, KIND)
    assert held(tmp_path) == {"a": "one"}


def test_a_lock_ends_with_its_owner(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from finebits import artefacts, files
with files.locked(Path({str(tmp_path)!r})):
    print(flush=True)
    time.sleep(60)
"""
    env = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env) as owner:
        assert owner.stdout is not None and owner.stdout.readline()
        with pytest.raises(files.Occupied), files.locked(tmp_path):
            pass
        owner.kill()
    with files.locked(tmp_path):
        pass


# What the system refuses ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_the_reason_is_said_in_a_sentence(error: Exception, said: str, tmp_path: Path) -> None:
    fill(tmp_path / "a", a="one")
    with (
        pytest.raises(files.CannotWrite, match=f"{tmp_path}/a cannot be written: {said}; .*name another place"),
        artefacts.folder(tmp_path / "a", KIND),
    ):
        raise error
    assert held(tmp_path / "a") == {"a": "one"}


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("/dev/full")
    with pytest.raises(OSError), open(tmp_path / "a", "w") as f:
        f.write("x")
    with pytest.raises(files.CannotWrite, match="the disk is full"), files.writing(tmp_path / "a"), open(tmp_path / "a", "w") as f:
        f.write("x")


def test_a_file_where_a_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(files.CannotWrite, match="is a file and no folder"):
            fill(place, a="one")
    assert (tmp_path / "file").read_text() == "mine"


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), artefacts.folder(tmp_path / "a", KIND):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")
    assert not os.listdir(tmp_path)
