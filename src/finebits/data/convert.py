"""Rows in another form: conversations under `messages`, or a prompt and what is learned after it.

Nothing that is learned is lost and nothing is added: a conversation of several learned answers becomes as many rows of prompt and
completion, and a
turn that is not learned keeps that as `weight: 0`. Of pairs the better answers are kept, of judged answers the wanted ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finebits.data.error import DataError
from finebits.data.rows import Row, Rows

FORMS = ("messages", "prompt_completion")


def converted(rows: Rows, to: str) -> Iterator[dict[str, Any]]:
    """Records of the form `to`. Raises DataError where rows have no turns.

    >>> from finebits.data.rows import shaped
    >>> rows = shaped([(1, {"instruction": "add 1, 2", "output": "3"})], "a.jsonl")
    >>> next(converted(rows, "prompt_completion"))["completion"]
    [{'role': 'assistant', 'content': '3'}]
    """
    if to not in FORMS:
        raise DataError(f"rows are converted to {' or '.join(FORMS)}; got {to!r}", code=2)
    if rows.format != "messages":
        raise DataError(f"{rows.path} holds {rows.format} rows, which have no turns to convert", code=2)
    for row in rows:
        if row.liked:
            yield from (_messages(row),) if to == "messages" else _pairs(row)


def _given(row: Row) -> dict[str, Any]:
    """What a template gets beside the turns, under the keys of a row."""
    direct = {k: v for k, v in row.template_kwargs.items() if k in ("tools", "documents")}
    rest = {k: v for k, v in row.template_kwargs.items() if k not in direct}
    return direct | ({"chat_template_kwargs": rest} if rest else {})


def _messages(row: Row) -> dict[str, Any]:
    turns = [{**turn, "weight": 0} if i in row.untrained else turn for i, turn in enumerate(row.messages or ())]
    return {"messages": turns, **_given(row)}


def _pairs(row: Row) -> Iterator[dict[str, Any]]:
    turns = list(row.messages or ())
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and i not in row.untrained:
            yield {"prompt": turns[:i], "completion": [turn], **_given(row)}
