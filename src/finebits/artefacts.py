"""Artefacts: folders that finebits writes whole or not at all, among files that others wrote.

An artefact (a saved model, an export, a checkpoint) is a folder with a record of itself, `finebits.json`, that names each of its files with its
sha256. It is written in `.finebits-saving` inside its place and then moved file by file: files that are in no record are never touched,
links are written through, and a save that was killed left the old artefact, or one that `settle` completes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from finebits.files import Occupied, beside, locked, read_json, sha256, write_text, writing

RECORD, STAGE, MOVES = "finebits.json", ".finebits-saving", "moves.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_model.*", "*.gguf")
MARKS = ("config.json", "adapter_config.json", *WEIGHTS)  # a folder with one of these is somebody's model


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
    for name in json.loads((stage / MOVES).read_text(encoding="utf-8")):
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
        copy = beside(place)  # a link to another disk
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
