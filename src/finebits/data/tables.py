"""Rows out of tables: a line of CSV, or a row of Parquet or Arrow, is one row, and its columns are the keys.

A cell of CSV is a string. Under a key that holds a list or an object in every form (`STRUCTURED`) it is read as JSON; under `label`, "true",
"false" and whole numbers are what they say, also where a table's missing ones have made 1.0 of 1.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finebits.data.error import DataError, names

STRUCTURED = ("messages", "conversations", "tools", "history", "input_ids", "labels", "attention_mask")
LONGEST = 1 << 30  # characters of a cell
LABELS = {"true": True, "false": False}


def separator(text: str, path: Path) -> str:
    """What stands between the cells: a tab in a .tsv file; else that of comma, semicolon and tab which the header has most of.

    >>> separator("prompt;completion\\n", Path("a.csv")), separator("text\\n", Path("a.csv"))
    (';', ',')
    """
    return "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first(text).count)


def first(text: str) -> str:
    """The first line that holds something, however lines end: that of the columns.

    >>> first("\\r\\nprompt,completion\\rhi,ho\\r")
    'prompt,completion'
    """
    return next((line for line in re.split("[\r\n]", text) if line.strip()), "")


def separated(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a table in text whose first line names its columns. Raises DataError, naming the line, where a row has more or fewer cells
    than the header, or the header is none.

    >>> list(separated('prompt,completion\\n"a\\nb",c\\n', Path("a.csv")))
    [(2, {'prompt': 'a\\nb', 'completion': 'c'})]
    """
    csv.field_size_limit(LONGEST)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator(text, path), strict=True)
    header: list[str] = []
    begun = 1
    try:
        for cells in reader:
            line, begun = begun, reader.line_num + 1
            if not any(cell.strip() for cell in cells) and len(cells) < 2:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if len({*header}) < len(header) or "" in header:
                    raise DataError(f"{path}:{line}: the first line of a table names its columns, each once; got {', '.join(header)[:200]}")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}:{line}: the row has {len(cells)} cells and the header names {len(header)} columns "
                    f"({names(dict.fromkeys(header))}): put a cell that holds the separator or a quote in double quotes"
                )
            yield line, {key: _cell(key, cell, f"{path}:{line}") for key, cell in zip(header, cells, strict=True)}
    except csv.Error as e:
        raise DataError(
            f"{path}:{reader.line_num}: no row of a table ({e}): put a cell with quotes or line breaks in double quotes"
        ) from None


def _cell(key: str, cell: str, where: str) -> Any:
    if key == "label":
        number = re.fullmatch(r"\s*([0-9]{1,9})(\.0*)?\s*", cell, re.ASCII)
        return LABELS.get(cell.strip().lower(), int(number[1]) if number else cell)
    if key not in STRUCTURED:
        return cell
    try:
        return json.loads(cell) if cell.strip() else None
    except (ValueError, RecursionError):
        raise DataError(f'{where}: the cell "{key}" must be a list or an object in JSON; got {cell[:40]!r}') from None


def columnar(content: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the row from 1, row) of a Parquet or an Arrow file. Raises DataError where it cannot be read.

    >>> import pyarrow, pyarrow.parquet
    >>> held = io.BytesIO()
    >>> pyarrow.parquet.write_table(pyarrow.table({"text": ["once", "twice"]}), held)
    >>> list(columnar(held.getvalue(), Path("a.parquet")))
    [(1, {'text': 'once'}), (2, {'text': 'twice'})]
    """
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise DataError(f'{path} is a table of columns, which pyarrow reads: pip install "finebits[train]"', code=2) from None
    line = 0
    try:
        if content.startswith(b"PAR1"):
            batches: Any = parquet.ParquetFile(pyarrow.BufferReader(content)).iter_batches()
        else:
            opened = ipc.open_file if content.startswith(b"ARROW1") else ipc.open_stream
            batches = opened(pyarrow.BufferReader(content)).read_all().to_batches()
        for batch in batches:
            columns = batch.schema.names
            if len({*columns}) < len(columns):
                twice = next(name for name in columns if columns.count(name) > 1)
                raise DataError(f"{path} has two columns that are called {twice!r}: rename or take out one of the two")
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except (pyarrow.ArrowException, OSError) as e:
        reason = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise DataError(f"{path}: the table cannot be read behind row {line} ({reason}): fetch or write the file again") from None
