"""Rows of a data set with the lines they stand on, and what shape they were found to have.

Two shapes so far: `messages`, a list of {role, content} with roles system, user and assistant, and `text`, one document a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

WANTED = 'a key "messages" (a list of {"role", "content"}) or a key "text" (a string)'
ROLES = ("system", "user", "assistant")
GIVEN = "the given data"


class DataError(ValueError):
    """The data set cannot be read. `code` is the exit code: 2 if there is no such file or format, 4 if its content is at fault."""

    def __init__(self, message: str, code: int = 4) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Row:
    """One row: `messages`, each {role, content}, or else `text`; `line` counts from 1."""

    line: int
    messages: tuple[dict[str, str], ...] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of one file, its format (messages or text), and why it was taken for that."""

    path: str
    format: str
    why: str
    rows: tuple[Row, ...]

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> Row | Rows:
        return Rows(self.path, self.format, self.why, self.rows[i]) if isinstance(i, slice) else self.rows[i]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def read(path: str | Path, format: str = "auto") -> Rows:
    """The rows of a .jsonl, .json or .txt file.

    A .json file holds a list of rows or one row; a .txt file holds one document per block of lines between blank lines; any other file is
    read as one JSON object a line. Raises DataError, naming the file and the line, if the file is missing or empty, a line is no JSON, a
    row has neither shape, or rows differ in shape.
    """
    path = Path(path)
    if format not in ("auto", "messages", "text"):
        raise DataError(f"the data format must be auto, messages or text; got {format!r}", code=2)
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "not there"
        raise DataError(f"the data set {path} is {what}: give a .jsonl, .json or .txt file", code=2)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: byte {e.object[e.start]:#04x} is not UTF-8: save the file as UTF-8") from None

    if path.suffix == ".txt":
        if format == "messages":
            raise DataError(f"{path} is plain text and cannot hold messages: write one JSON object a line into a .jsonl file", code=2)
        rows = tuple(Row(line, text=block) for line, block in _blocks(text))
        if not rows:
            raise DataError(f"{path} is empty: a .txt data set holds one document per block of lines between blank lines")
        return Rows(str(path), "text", f"a .txt file with {len(rows):,} blocks between blank lines", rows)
    return shaped(_whole(text, path) if path.suffix == ".json" else _lines(text, path), str(path), format)


def shaped(records: Iterable[tuple[int, Any]], path: str, format: str = "auto") -> Rows:
    """Rows from (line, parsed object) pairs; `path` is what errors call them. Raises DataError as `read` does."""
    rows: list[Row] = []
    keys: set[str] = set()
    first = 0
    for line, record in records:
        where = f"{path}:{line}"
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: a row must be a JSON object with {WANTED}; got {_kind(record)}")
        if format == "auto":
            found = next((key for key in ("messages", "text") if key in record), None)
            if found is None:
                raise DataError(f"{where}: found the keys {_names(record)}; wanted {WANTED}")
            format, first = found, line
        elif format not in record:
            before = f' as in line {first} ("format: auto" needs rows of one shape)' if first else ""
            raise DataError(f'{where}: wanted a key "{format}"{before}; found the keys {_names(record)}')
        if format == "text":
            if not isinstance(record["text"], str):
                raise DataError(f'{where}: "text" must be a string; got {_kind(record["text"])}')
            rows.append(Row(line, text=record["text"]))
            continue
        if record.get("tools"):
            raise DataError(f'{where}: the row declares "tools", which finebits does not read yet: leave such rows out')
        rows.append(Row(line, messages=_messages(record["messages"], where)))
        keys.update(message["role"] for message in rows[-1].messages or ())
    if not rows:
        raise DataError(f"{path} is empty: it must hold at least one row with {WANTED}")
    roles = ", roles " + "/".join(sorted(keys, key=lambda r: (ROLES.index(r) if r in ROLES else len(ROLES), r))) if keys else ""
    decided = "detected" if first else "asked for"
    return Rows(path, format, f'{decided}: key "{format}" in {len(rows):,}/{len(rows):,} rows{roles}', tuple(rows))


def gathered(data: Rows | str | Path | Iterable[Row | Mapping[str, Any]]) -> Rows:
    """Rows from what a caller has: rows, a path, or an iterable of rows or of objects like those of a JSONL file, counted from 1.

    Raises DataError as `read` does.
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, str | Path):
        return read(data)
    given = list(data)
    rows = tuple(row for row in given if isinstance(row, Row))
    if rows:
        kinds = {"text" if row.messages is None else "messages" for row in rows} | ({"no Row"} if len(rows) < len(given) else set())
        if len(kinds) > 1:
            raise DataError(f"{GIVEN} mixes rows of several kinds ({', '.join(sorted(kinds))}): give rows of one kind")
        return Rows(GIVEN, kinds.pop(), "given as rows", rows)
    return shaped(enumerate(given, 1), GIVEN)


def disorder(messages: Sequence[Mapping[str, str]]) -> str | None:
    """What is wrong with the order of roles, as the end of a sentence that begins "these rows …"; None if nothing is.

    Right is: perhaps one system turn, then user and assistant in turn, the assistant last.
    """
    roles = [message["role"] for message in messages]
    for role in roles:
        if role not in ROLES:
            return f"hold a turn of the role {role!r} (known: system, user, assistant)"
    if "system" in roles[1:]:
        return "hold a system turn that is not the first turn"
    turns = roles[roles[:1] == ["system"] :]
    if "assistant" not in turns:
        return "hold no assistant turn"
    if turns[0] == "assistant":
        return "begin with an assistant turn"
    for one, next_ in zip(turns, turns[1:], strict=False):
        if one == next_:
            return f"hold two {one} turns in a row"
    return "end with a user turn" if turns[-1] == "user" else None


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else _kind(value)
        raise DataError(f'{where}: "messages" must be a list of {{"role", "content"}}; got {got}')
    for i, message in enumerate(value):
        at = f"{where}: turn {i + 1}"
        if not isinstance(message, Mapping):
            raise DataError(f'{at} must be an object with "role" and "content"; got {_kind(message)}')
        if message.get("tool_calls"):
            raise DataError(f'{at} holds "tool_calls", which finebits does not read yet: leave such rows out')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                got = _kind(message[key]) if key in message else f"the keys {_names(message)}"
                raise DataError(f'{at} needs "{key}" as a string; got {got}')
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parsed(line, path, number, " (each line must be one JSON object)", _skip(line, 0))[0]


def _whole(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a .json file, each with the line that it begins on: a list of rows, or rows one after the other."""
    at, line, counted = _skip(text, 0), 1, 0
    listed = text.startswith("[", at)
    if listed:
        at = _skip(text, at + 1)
    while at < len(text) and not (listed and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        row, end = _parsed(text, path, line, "", at)
        yield line, row
        at = _skip(text, end)
        if listed:
            if not text.startswith((",", "]"), at):
                line += text.count("\n", counted, at)
                raise DataError(f"{path}:{line}: the list of rows is broken off: wanted a comma or ] after the row")
            at = _skip(text, at + 1) if text[at] == "," else at
    if listed and (at >= len(text) or text[at + 1 :].strip()):
        what = "not closed by ]" if at >= len(text) else "followed by more text"
        raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: the list of rows is {what}")


def _skip(text: str, at: int) -> int:
    """The first position from `at` on that holds no white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _parsed(text: str, path: Path, line: int, want: str, at: int) -> tuple[Any, int]:
    """The JSON value at `at`, and where it ends. With `want` the text is one line, which must hold nothing else."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
        if want and text[end:].strip():
            raise json.JSONDecodeError("more text follows the object", text, _skip(text, end))
        return value, end
    except json.JSONDecodeError as e:
        line, column = (line, e.pos + 1) if want else (e.lineno, e.colno)
        raise DataError(f"{path}:{line}: not JSON at column {column}: {e.msg}{want}") from None
    except RecursionError:
        raise DataError(f"{path}:{line}: the JSON is nested too deeply to be a row") from None


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            block.append(line.rstrip("\r"))
        elif block:
            yield number - len(block), "\n".join(block)
            block = []


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(key)[:40]) for key in list(record)[:12]) or "(none)"


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")
