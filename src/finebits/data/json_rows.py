"""Rows out of JSON texts, each with the line that it begins on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finebits.data.error import DataError


def rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of a list of values, of values one after the other (a .json file), or of one value a line (any other). Raises DataError,
    naming line and column, where there is something else.

    >>> list(rows('{"text": "once"}\\n\\n{"text": "twice"}', Path("a.jsonl")))
    [(1, {'text': 'once'}), (3, {'text': 'twice'})]
    >>> list(rows('[{"a": 1, "a": 2}]', Path("a.json")))
    Traceback (most recent call last):
        ...
    finebits.data.error.DataError: a.json:1: an object has the key 'a' twice: take one of the two out
    """
    whole = path.suffix.lower() == ".json" or re.match(r"\s*\[\s*\{", text)
    return _anywhere(text, path) if whole else _by_line(text, path)


def _by_line(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # str.splitlines would also cut at U+2028, which JSON strings may hold; line ends they may not.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        line = line.removeprefix("\ufeff")  # of a file that was put behind another
        if line.strip():
            yield number, _parsed(line, path, number, " (each line must be one JSON object)", skip(line, 0))[0]


def _anywhere(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a .json file, each with the line that it begins on: a list of rows, or rows one after the other."""
    at, line, counted = skip(text, 0), 1, 0
    listed = text.startswith("[", at)
    if listed:
        at = skip(text, at + 1)
    while at < len(text) and not (listed and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        row, end = _parsed(text, path, line, "", at)
        yield line, row
        at = skip(text, end)
        if listed:
            if not text.startswith((",", "]"), at):
                line += text.count("\n", counted, at)
                raise DataError(f"{path}:{line}: the list of rows is broken off: wanted a comma or ] after the row")
            at = skip(text, at + 1) if text[at] == "," else at
    if listed and (at >= len(text) or text[at + 1 :].strip()):
        what = "not closed by ]" if at >= len(text) else "followed by more text"
        raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: the list of rows is {what}")


def skip(text: str, at: int) -> int:
    """The first position from `at` on that holds no white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _parsed(text: str, path: Path, line: int, want: str, at: int) -> tuple[Any, int]:
    """The JSON value at `at`, and where it ends. With `want` the text is one line, which must hold nothing else."""
    try:
        value, end = DECODER.raw_decode(text, at)
        if want and text[end:].strip():
            raise json.JSONDecodeError("more text follows the object", text, skip(text, end))
        return value, end
    except Twice as e:
        raise DataError(f"{path}:{line}: an object has the key {str(e)[:40]!r} twice: take one of the two out") from None
    except json.JSONDecodeError as e:
        line, column = (line, e.pos + 1) if want else (e.lineno, e.colno)
        raise DataError(f"{path}:{line}: not JSON at column {column}: {e.msg}{want}") from None
    except RecursionError:
        raise DataError(f"{path}:{line}: the JSON is nested too deeply to be a row") from None
    except ValueError:  # of int(): Python reads 4300 digits
        raise DataError(f"{path}:{line}: a number has more digits than can be read: write it in quotes, or leave it out") from None


class Twice(Exception):
    """A key that an object has twice."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise Twice(next(key for i, (key, _) in enumerate(pairs) if any(key == k for k, _ in pairs[:i])))
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)
