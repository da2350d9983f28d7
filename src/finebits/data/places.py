"""Where rows lie: a file, the files of a folder or of a pattern, or a data set of the Hugging Face hub.

In a folder whose names tell splits (train.jsonl, data/test-00000-of-00001.parquet, validation/a.csv) one split is read, `train` where none is
asked for: what is to be tested on is not trained on because it lies beside the rest. Which words name which split is datasets' own list.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finebits.data.error import DataError
from finebits.data.kinds import ENDINGS

KNOWN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
HELD = ".jsonl, .json, .csv, .tsv, .parquet or .txt"
NO_ROWS = ("readme", "license", "dataset_info", "dataset_infos", "state", "notice", "changelog")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
HUB = re.compile(r"(?:hf://datasets/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")


@dataclass(frozen=True)
class Place:
    """Files of rows, and in words which they are; or else a `source` for the library datasets: a hub id, or a folder in its form."""

    files: tuple[Path, ...] = ()
    why: str = ""
    source: str = ""


def find(path: str, split: str | None = None, data_files: Sequence[str] = (), asks: bool = False) -> Place:
    """Where the rows of a path lie. `data_files` are patterns inside a folder; `asks` says that something is asked for that datasets alone
    knows (a configuration by its name). Raises DataError (exit code 2) where there is nothing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("train.jsonl", "test.jsonl"):
    ...         _ = Path(folder, name).write_text('{"text": "once"}')
    ...     place = find(folder)
    >>> [file.name for file in place.files], place.why
    (['train.jsonl'], 'the split train of a folder (1 of 2 files)')
    >>> find("stanfordnlp/imdb").source
    'stanfordnlp/imdb'
    """
    where = Path(path)
    if not path.strip():
        raise DataError("the path of the data set is empty: give a file, a folder, or a hub id", code=2)
    try:
        there = where.exists()
    except OSError as e:
        raise DataError(
            f"the data set {path[:60]}… cannot be looked for ({e.strerror}): give a file, a folder, or a hub id", code=2
        ) from None
    if there and where.is_file():
        if split is not None or data_files or asks:
            key = "split" if split is not None else "data_files" if data_files else "name"
            raise DataError(f"{path} is one file, and {key} is a choice inside a folder or a hub id: leave it out", code=2)
        return Place((where,))
    if there and where.is_dir():
        if asks or _of_datasets(where):
            return Place(source=path)
        return _folder(where, split, data_files)
    if glob.has_magic(path):
        files = sorted(file for file in map(Path, glob.glob(path, recursive=True)) if file.is_file())
        if not files:
            raise DataError(f"no file is named like {path}: look at the pattern, which begins at the current folder", code=2)
        if split is not None or asks or data_files:
            raise DataError(f"{path} is a pattern, which names its files by itself: leave split, name and data_files out", code=2)
        return Place(tuple(files), f"{len(files)} files of a pattern" if len(files) > 1 else "")
    if (hub := HUB.fullmatch(path)) and not ends(where):
        return Place(source=hub[1])
    raise DataError(f"the data set {path} is not there: give a {HELD} file, a folder of such files, or a hub id such as owner/name", code=2)


def ends(file: Path) -> str:
    """The ending that says what kind of rows a file holds, whatever compressed it; empty where it is none of these.

    >>> ends(Path("a.jsonl.gz")), ends(Path("A.CSV")), ends(Path("a.png"))
    ('.jsonl', '.csv', '')
    """
    suffix = (Path(file.stem).suffix if file.suffix.lower() in ENDINGS else file.suffix).lower()
    return suffix if suffix in KNOWN else ""


def _of_datasets(folder: Path) -> bool:
    """Did datasets write the folder, or does its card name configurations?"""
    if (folder / "dataset_dict.json").is_file() or ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return True
    card = folder / "README.md"
    return card.is_file() and re.match(r"---\n(?:.*\n)*?configs:", card.read_text(errors="replace", encoding="utf-8")) is not None


def _folder(folder: Path, split: str | None, data_files: Sequence[str]) -> Place:
    every = [file for file in sorted(folder.rglob("*")) if file.is_file() and not any(p.startswith(".") for p in _parts(folder, file))]
    if data_files:
        if odd := [p for p in data_files if not p.strip() or Path(p).is_absolute() or not Path(p).parts]:
            raise DataError(
                f"data_files has {odd[0]!r}, which is no pattern of files inside {folder}: write one such as data/*.jsonl", code=2
            )
        files = sorted({file for pattern in data_files for file in folder.glob(pattern) if file.is_file()})
        if not files:
            raise DataError(f"no file in {folder} is named like {' or '.join(data_files)}", code=2)
        return Place(tuple(files), f"{len(files)} files of a folder")
    files = [file for file in every if ends(file) and file.name.partition(".")[0].lower() not in NO_ROWS]
    if not files:
        raise DataError(f"the folder {folder} holds no {HELD} file: give a file, or a folder of such files", code=2)
    known = {file: _split(_parts(folder, file)) for file in files}
    found = sorted({s for s in known.values() if s})
    if not found:
        if split not in (None, "train"):
            raise DataError(f"no file in {folder} has a name that says it is of the split {split}", code=2)
        return Place(tuple(files), f"{len(files)} file{'s' if len(files) > 1 else ''} of a folder")
    wanted = split or "train"
    chosen = tuple(file for file in files if known[file] == wanted)
    if not chosen:
        raise DataError(f"{folder} has no split {wanted}: its files are of {' and '.join(found)}; name one of these as split", code=2)
    return Place(chosen, f"the split {wanted} of a folder ({len(chosen)} of {len(files)} files)")


def _parts(folder: Path, file: Path) -> tuple[str, ...]:
    return file.relative_to(folder).parts


def _split(parts: Sequence[str]) -> str:
    """The split that a file's name or a folder's says, the nearest first."""
    for part in reversed(parts):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLITS.items():
            if any(name in words for name in names):
                return split
    return ""
