"""Files that are whole or not there, read with care where others wrote them; folders that one process holds.

A file is written beside its place and takes that in one step, through a link, if there is one. What goes wrong is one sentence.
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
from pathlib import Path
from typing import Any

from finebits.errors import FinebitsError, Invalid

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

POINTER = b"version https://git-lfs.github.com/spec"
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
        new = beside(place)
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
        fetched(path)
        raise Invalid(f"{path} is not JSON ({e}): fetch or write it again") from None


def fetched(path: Path) -> None:
    """Raise Invalid where a file is what Git LFS leaves in the place of one that was not fetched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.safetensors")
    ...     write_text(path, POINTER.decode() + "/v1")
    ...     try:
    ...         fetched(path)
    ...     except Invalid as e:
    ...         print(str(e).removeprefix(f"{path} "))
    is a pointer of Git LFS in the place of a file: fetch the file itself (git lfs pull)
    """
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise Invalid(f"{path} is a pointer of Git LFS in the place of a file: fetch the file itself (git lfs pull)")


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


def beside(place: Path) -> Path:
    """Where this thread of this process writes what is to take a place.

    >>> beside(Path("a/b.txt")).parent
    PosixPath('a')
    """
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
