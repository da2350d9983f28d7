"""Files and folders that are whole or not there, among files that others wrote.

An artefact (a saved model, an export, a checkpoint) is a folder with a record of itself, `finebits.json`, that names each of its files with its
sha256. It is written in `.finebits-saving` inside its place and then moved file by file: files that are in no record are never touched,
links are written through, and a save that was killed left the old artefact, or one that `settle` completes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from finebits.errors import FinebitsError, Invalid

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

RECORD, STAGE, MOVES = "finebits.json", ".finebits-saving", "moves.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_model.*", "*.gguf")
MARKS = ("config.json", "adapter_config.json", *WEIGHTS)  # a folder with one of these is somebody's model
LONGEST = 2**26  # bytes of a JSON file that is read
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not be so large there",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "a part of that path is a file and no folder",
    errno.EEXIST: "that is a file and no folder",
}
FULL = ("No space left on device", "os error 28", "PytorchStreamWriter failed")  # as libraries that do not raise OSError say it


class CannotWrite(FinebitsError, OSError):
    """The system did not let a file be written.

    >>> isinstance(CannotWrite("…"), OSError), CannotWrite.code
    (True, 1)
    """


class Occupied(Invalid):
    """The folder holds what finebits did not write there, or what another process is writing.

    >>> Occupied.code  # bad usage: another place is to be named
    2
    """

    code = 2


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is written becomes one sentence.

    >>> with writing(Path("out/model")):
    ...     raise OSError(errno.ENOSPC, "No space left on device", "out/model/weights")
    Traceback (most recent call last):
        ...
    finebits.files.CannotWrite: out/model cannot be written: the disk is full; free some of it, or name another place
    """
    try:
        yield
    except CannotWrite:
        raise
    except OSError as e:
        if e.errno is None and "requested and" in str(e):  # numpy's, whose tofile does not say why
            raise _refused(path, "the disk is full, or takes no file so large") from e
        where = e.filename if isinstance(e.filename, str) else str(path)
        inside = Path(os.path.realpath(where)).is_relative_to(os.path.realpath(path)) or Path(os.path.abspath(path)).is_relative_to(where)
        if e.errno not in REASONS or not inside:
            raise
        raise _refused(path, REASONS[e.errno]) from e
    except Exception as e:
        if any(words in str(e) for words in FULL):
            raise _refused(path, REASONS[errno.ENOSPC]) from e
        raise


def _refused(path: Path, why: str) -> CannotWrite:
    way = "free some of it" if "disk" in why else "change that"
    return CannotWrite(f"{path} cannot be written: {why}; {way}, or name another place")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which it then replaces in one step; through a link, if it is one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.txt")
    ...     with contextlib.suppress(KeyboardInterrupt), replaced(path) as new:
    ...         new.write_text("half of")
    ...         raise KeyboardInterrupt
    ...     print(path.exists(), list(path.parent.iterdir()))
    7
    False []
    """
    with writing(path):
        place = Path(os.path.realpath(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        for old in place.parent.glob(f".{place.name}.*.new"):
            if not _alive(old.name.split(".")[-3]):
                old.unlink(missing_ok=True)
        new = _beside(place)
        try:
            yield new
            if place.exists():
                shutil.copymode(place, new)
            os.replace(new, place)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder, "new", "a.txt"), "whole or not there")
    ...     print(Path(folder, "new", "a.txt").read_text())
    whole or not there
    """
    with replaced(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by a value of JSON in one step.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder, "a.json"), {"bits": 4})
    ...     print(json.loads(Path(folder, "a.json").read_text()))
    {'bits': 4}
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, most: int = LONGEST) -> dict[str, Any]:
    """The object of a JSON file that somebody else wrote. Raises Invalid, in one sentence, where it is no file, is longer than `most` bytes, or
    is no object of JSON; NaN is no number, and no key comes twice.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.json")
    ...     write_text(path, '{"bits": NaN}')
    ...     try:
    ...         read_json(path)
    ...     except Invalid as e:
    ...         print(str(e).removeprefix(f"{path} "))
    is not JSON (NaN is no number): fetch or write it again
    """
    if not path.is_file():
        raise Invalid(f"there is no file {path}")
    if (size := path.stat().st_size) > most:
        raise Invalid(f"{path} has {size:,} bytes, and at most {most:,} are read: it is no such file, or damaged")
    try:
        return parsed(path.read_bytes())
    except ValueError as e:
        raise Invalid(f"{path} is not JSON ({e}): fetch or write it again") from None


def parsed(text: str | bytes) -> dict[str, Any]:
    """The object that a text is in JSON, as `read_json` has it. Raises ValueError.

    >>> parsed('{"bits": 4}')
    {'bits': 4}
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [k for k, _ in pairs]
            raise Invalid(f"the key {next(k for k in keys if keys.count(k) > 1)[:60]!r} comes twice")
        return found

    def no_number(word: str) -> float:
        if word == "NaN":
            raise Invalid("NaN is no number")
        return float(word)

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except RecursionError:
        raise Invalid("its values lie too deep in each other") from None
    if not isinstance(value, dict):
        raise Invalid(f"a {type(value).__name__} and no object")
    return value


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.{os.getpid()}.{threading.get_ident()}.new")


def _alive(process: str) -> bool:
    if os.name != "posix" or not process.isdigit():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def ours(path: Path, mark: str) -> None:
    """Raise Occupied if there is a file that has no `mark`, by which those that finebits writes under that name are known.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ours(Path(folder, "run.json"), "finebits.run/1")  # nothing is there
    ...     write_text(Path(folder, "run.json"), "{}")
    ...     try:
    ...         ours(Path(folder, "run.json"), "finebits.run/1")
    ...     except Occupied as e:
    ...         print(str(e).rpartition("/")[2])
    run.json is a file that finebits did not write, and would be replaced: move it, or name another place
    """
    if path.is_file() and path.stat().st_size and mark.encode() not in path.read_bytes():
        raise Occupied(f"{path} is a file that finebits did not write, and would be replaced: move it, or name another place")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     sha256(Path(file.name))[:16]  # of nothing
    'e3b0c44298fc1c14'
    """
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def record(folder: Path, schema: str, **about: Any) -> None:
    """Write the record of an artefact that is complete but for it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     write_text(Path(place, "plan.json"), "{}")
    ...     record(Path(place), "finebits.saved/1", model="m")
    ...     print({k: list(v) if isinstance(v, dict) else v for k, v in recorded(Path(place)).items()})
    {'schema': 'finebits.saved/1', 'model': 'm', 'sha256': ['plan.json']}
    """
    shas = {name: sha256(folder / name) for name in _files(folder) if name != RECORD}
    write_text(folder / RECORD, json.dumps({"schema": schema, **about, "sha256": shas}, indent=1) + "\n")


def recorded(folder: Path) -> dict[str, Any]:
    """The record of an artefact; empty where there is none that can be read.

    >>> recorded(Path("/nowhere"))
    {}
    """
    try:
        contents = read_json(folder / RECORD)
    except (OSError, ValueError):
        return {}
    if isinstance(contents.get("sha256"), dict) and isinstance(contents.get("schema"), str):
        return contents
    return {}


def intact(folder: Path) -> bool:
    """Does the folder hold every file of its record as it was written?

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     write_text(Path(place, "weights"), "…")
    ...     record(Path(place), "finebits.saved/1")
    ...     write_text(Path(place, "weights"), "other")
    ...     print(intact(Path(place)))
    False
    """
    contents = recorded(folder)
    return bool(contents) and all((folder / name).is_file() and sha256(folder / name) == sha for name, sha in contents["sha256"].items())


def owned(folder: Path) -> set[str]:
    """The files of an artefact by its record, which may be a stranger's: no name leads out of the folder.

    >>> owned(Path("/nowhere"))
    set()
    """
    names = {name for name in recorded(folder).get("sha256", {}) if isinstance(name, str)}
    inside = {n for n in names if n and not PurePosixPath(n).is_absolute() and ".." not in PurePosixPath(n).parts}
    return inside | {RECORD} if inside else set()


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@contextlib.contextmanager
def locked(folder: Path, what: str = "is being saved to by another process: wait for it, or name another folder") -> Iterator[int]:
    """Hold a folder for this process and those that share the open file it gives; the lock ends with the last of them. Raises Occupied.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place, locked(Path(place)):
    ...     try:
    ...         with locked(Path(place), "is in use"):
    ...             pass
    ...     except Occupied as e:
    ...         print(str(e).removeprefix(place))
     is in use
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Occupied(f"{folder} {what}") from None
            except OSError:  # a file system that has no locks
                pass
        yield handle
    finally:
        os.close(handle)


def held(folder: Path) -> bool:
    """Does somebody hold a folder? Where a file system has no locks, nobody is seen to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with locked(Path(place)):
    ...         print(held(Path(place)))
    ...     print(held(Path(place)))
    True
    False
    """
    if fcntl is None:
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def shared(file: Path, to: Path) -> None:
    """The same file under another name, where the disk allows that, or else a copy. Whoever replaces one leaves the other as it is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     old, new = Path(place, "a"), Path(place, "more", "b")
    ...     write_text(old, "one")
    ...     shared(old, new)
    ...     write_text(old, "two")
    ...     print(new.read_text())
    one
    """
    with replaced(to) as new:
        try:
            os.link(os.path.realpath(file), new)
        except OSError:
            shutil.copyfile(file, new)


@contextlib.contextmanager
def folder(path: Path, schema: str, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill and to `record`; its files come to `path` when the block ends well, and those of the artefact that was there go.

    Raises Occupied where `path` holds another artefact, or a file of a stranger under a name that would be written; with `overwrite` these
    files, and the weights of the other artefact, are replaced. All else in `path` stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with folder(Path(place, "model"), "finebits.saved/1") as new:
    ...         write_text(new / "weights", "…")
    ...         record(new, "finebits.saved/1")
    ...     print(sorted(p.name for p in Path(place, "model").iterdir()), intact(Path(place, "model")))
    ['finebits.json', 'weights'] True
    """
    with writing(path):
        place = Path(os.path.realpath(path))
        fresh = not place.exists()
        place.mkdir(parents=True, exist_ok=True)
        try:
            with locked(place):
                _settle(place)
                if not overwrite:
                    _vacant(path, place, schema)
                stage = place / STAGE
                try:
                    (stage / "new").mkdir(parents=True)
                    yield stage / "new"
                    new = _files(stage / "new")
                    assert RECORD in new, "an artefact is recorded before it is moved"
                    _agree(path, place, new, overwrite)
                    gone = owned(place) | ({p.name for p in place.iterdir() if _is(p, WEIGHTS)} if overwrite else set())
                    write_text(stage / MOVES, json.dumps(sorted(gone - set(new))))  # from here on, what is not moved now is moved later
                    _finish(place)
                finally:
                    if not (stage / MOVES).exists():
                        shutil.rmtree(stage, ignore_errors=True)
        except BaseException:
            if fresh:
                with contextlib.suppress(OSError):
                    place.rmdir()
            raise


def _is(path: Path, names: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, n) for n in names)


def _vacant(path: Path, place: Path, schema: str) -> None:
    contents = recorded(place)
    if contents.get("schema") == schema:
        return
    foreign = [RECORD] if contents else [p.name for p in sorted(place.iterdir()) if _is(p, MARKS)]
    if foreign:
        kind = (
            f"an artefact of another kind ({contents['schema']})"
            if contents
            else f"a model that finebits did not write there ({foreign[0]})"
        )
        raise Occupied(f"{path} holds {kind}: name another folder, or ask for it to be replaced (overwrite)")


def _agree(path: Path, place: Path, new: list[str], overwrite: bool) -> None:
    own = owned(place)
    for name in new:
        there = place / name
        if there.is_dir():
            raise Occupied(f"{there} is a folder, and a file of that name is to be written: name another folder than {path}")
        if os.path.lexists(there) and name not in own and not overwrite:
            raise Occupied(
                f"{path} holds a {name} that finebits did not write: name another folder, or ask for it to be replaced (overwrite)"
            )


def settle(path: Path) -> None:
    """Complete a save into `path` that was killed while its files were moved; one that had not come so far left nothing that counts."""
    place = Path(os.path.realpath(path))
    if (place / STAGE / MOVES).exists():
        with writing(path), locked(place):
            _settle(place)


def _settle(place: Path) -> None:
    if (place / STAGE / MOVES).exists():
        _finish(place)
    shutil.rmtree(place / STAGE, ignore_errors=True)


def _finish(place: Path) -> None:
    stage = place / STAGE
    for name in sorted(_files(stage / "new"), key=lambda n: n == RECORD):
        _move(stage / "new" / name, place / name)
    for name in json.loads((stage / MOVES).read_text()):
        _unlink(place, name)
    shutil.rmtree(stage)


def _move(new: Path, there: Path) -> None:
    place = Path(os.path.realpath(there))
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(new, place)
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        copy = _beside(place)  # a link to another disk
        shutil.copyfile(new, copy)
        os.replace(copy, place)
        new.unlink()


def _unlink(place: Path, name: str) -> None:
    (place / name).unlink(missing_ok=True)
    for above in (place / name).parents:
        if above == place:
            break
        with contextlib.suppress(OSError):
            above.rmdir()


def rebased(path: Path, old: Path, new: Path) -> None:
    """A JSON file of a recorded artefact that was moved: what its values say of the folder `old` is said of `new`."""
    data, before, after = json.loads(path.read_text(encoding="utf-8")), f"{old}{os.sep}", f"{new}{os.sep}"
    moved = {k: after + v.removeprefix(before) if isinstance(v, str) and v.startswith(before) else v for k, v in data.items()}
    contents = recorded(path.parent)
    if moved != data and contents:
        write_text(path, json.dumps(moved, indent=2) + "\n")
        write_text(path.parent / RECORD, json.dumps(contents | {"sha256": contents["sha256"] | {path.name: sha256(path)}}, indent=1) + "\n")


def remove(path: Path) -> None:
    """Take an artefact away; the folder stays if others have files in it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     write_text(Path(place, "model", "weights"), "…")
    ...     record(Path(place, "model"), "finebits.saved/1")
    ...     write_text(Path(place, "model", "notes"), "of somebody else")
    ...     remove(Path(place, "model"))
    ...     print([p.name for p in Path(place, "model").iterdir()])
    ['notes']
    """
    place = Path(os.path.realpath(path))
    if place.is_dir():
        shutil.rmtree(place / STAGE, ignore_errors=True)
        for name in owned(place):
            _unlink(place, name)
        with contextlib.suppress(OSError):
            path.rmdir()
