"""Records out of places: what stands in the files, before anyone asks which form its rows have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finebits.data import json_rows, tables
from finebits.data.error import DataError
from finebits.data.kinds import refuse, unpacked
from finebits.data.places import find

TEXTS = {".txt": "blocks between blank lines", ".md": "one document"}


@dataclass(frozen=True)
class Found:
    """(line, record) of one file, and in words what the file is where that was looked at; `text`: it holds plain documents."""

    path: str
    records: Iterable[tuple[int, Any]]
    why: str = ""
    text: bool = False


def found(
    path: str | Path, split: str | None = None, name: str | None = None, data_files: Sequence[str] = (), revision: str | None = None
) -> tuple[list[Found], str]:
    """The files of a place (finebits.data.places), and which they are in words; of a hub id the rows of one split of one configuration `name`.
    Raises DataError where there is nothing, or a file is of a kind that holds no rows.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.csv").write_text("prompt;completion\\nhi;ho\\n")
    ...     (file,), _ = found(f"{folder}/a.csv")
    ...     print(file.why, *file.records)
    a table with the columns prompt, completion, separated by ";":  (2, {'prompt': 'hi', 'completion': 'ho'})
    """
    place = find(str(path), split, data_files, asks=name is not None or revision is not None)
    if not place.source:
        return [opened(file) for file in place.files], place.why
    from finebits.interop import data_sets

    where, records = data_sets.records(place.source, name, split, data_files, revision)
    return [Found(where, enumerate(records, 1))], ""


def opened(file: Path) -> Found:
    """One file. Raises DataError if it is of a kind that holds no rows, or its text is no UTF-8."""
    content, inner, packed = unpacked(file.read_bytes(), file)
    refuse(content, file)
    why = f"{packed}, " if packed else ""
    if content.startswith((b"PAR1", b"ARROW1")) or inner.suffix.lower() == ".arrow":
        kind = "Parquet" if content.startswith(b"PAR1") else "Arrow"
        return Found(str(file), tables.columnar(content, file), f"{why}{kind}: ")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise DataError(f"{file}:{line}: byte {e.object[e.start]:#04x} is not UTF-8: save the file as UTF-8") from None
    ending = inner.suffix.lower()
    if ending in TEXTS:
        text = re.sub("\r\n?", "\n", text)
        blocks = list(_blocks(text)) if ending == ".txt" else [(1, text.strip())] if text.strip() else []
        count = f"{len(blocks):,} " if ending == ".txt" else ""
        documents = [(line, {"text": block}) for line, block in blocks]
        return Found(str(file), documents, f"{why}a {ending} file with {count}{TEXTS[ending]}", text=True)
    if ending in (".csv", ".tsv"):
        columns = tables.first(text).strip()
        between = tables.separator(text, inner)
        shown = ", ".join(c.strip(' "') for c in columns.split(between)[:6])
        said = "a tab" if between == "\t" else f'"{between}"'
        return Found(
            str(file), tables.separated(text, inner.with_name(file.name)), f"{why}a table with the columns {shown}, separated by {said}: "
        )
    return Found(str(file), json_rows.rows(text, file), why)


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            block.append(line)
        elif block:
            yield number - len(block), "\n".join(block)
            block = []
