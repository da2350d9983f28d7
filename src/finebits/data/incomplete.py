"""Conversations that are not complete: they end without an answer, or hold none."""

from __future__ import annotations

from dataclasses import replace

from finebits.data.error import DataError
from finebits.data.finding import lines_
from finebits.data.rows import Row, Rows


def complete(rows: Rows) -> Rows:
    """The rows but for conversations whose last turn is not the assistant's; how many were left out is said in `why`. Raises DataError where
    none is left.

    >>> from finebits.data.rows import shaped
    >>> asked, told = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    >>> rows = complete(shaped([(1, {"messages": [asked, told]}), (2, {"messages": [asked, told, asked]})], "a.jsonl"))
    >>> len(rows), rows.why.partition("; ")[2]
    (1, '1 incomplete row left out (line 2)')
    """
    kept = tuple(row for row in rows if not _open(row))
    if len(kept) == len(rows):
        return rows
    if not kept:
        raise DataError(f"{rows.path} holds no complete conversation: none of its {len(rows):,} rows ends with an assistant turn")
    several = len({row.path for row in rows}) > 1
    left = [f"{row.path}:{row.line}" if several else row.line for row in rows if _open(row)]
    what = f"{len(left):,} incomplete row{'s' if len(left) > 1 else ''} left out ({lines_(left)})"
    return replace(rows, why=f"{rows.why}; {what}", rows=kept)


def _open(row: Row) -> bool:
    return row.messages is not None and row.messages[-1]["role"] != "assistant"
