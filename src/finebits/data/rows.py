"""Rows of a data set with the lines they stand on, and what shape they were found to have.

Two shapes so far: `messages`, a list of {role, content} with roles system, user, assistant and tool, and `text`, one document a row.

A message may say more than its role and content. `weight` (0 or 1) and `train` say whether an assistant's turn is learned; any other key
that holds something goes to the chat template as it is, and a row whose template does not read it is refused there (finebits.data.turns).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from finebits.data.arrays import Tokens
from finebits.errors import Invalid

WANTED = 'a key "messages" (a list of {"role", "content"}) or a key "text" (a string)'
ROLES = ("system", "user", "assistant", "tool")
FOR_TEMPLATE = {"tools": list, "documents": list, "chat_template_kwargs": dict}  # keys of a row, beside messages, that a template is given
GIVEN = "the given data"


class DataError(Invalid):
    """The data set cannot be read. `code` is the exit code: 2 if there is no such file or format, 4 if its content is at fault."""

    def __init__(self, message: str, code: int = 4) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Row:
    """One row: `messages`, each {role, content} and what else a template reads, or else `text`; `line` counts from 1, in the file `path`
    where that is known. `untrained` are the turns that are shown and not learned; `given` is what the template gets beside messages."""

    line: int
    messages: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    path: str = field(default="", compare=False)
    untrained: frozenset[int] = frozenset()
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> Any:
        """All that the model sees of the row or learns from it, as plain data."""
        if self.messages is None:
            return self.text
        more = [{"untrained": sorted(self.untrained), "given": dict(self.given)}] if self.untrained or self.given else []
        return [*self.messages, *more]


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
        rows = tuple(Row(line, text=block, path=str(path)) for line, block in _blocks(text))
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
            _characters(record["text"], f'{where}: "text"')
            rows.append(Row(line, text=record["text"], path=path))
            continue
        messages, untrained = _messages(record["messages"], where)
        rows.append(Row(line, messages, None, path, untrained, _given(record, where)))
        keys.update(message["role"] for message in rows[-1].messages or ())
    if not rows:
        raise DataError(f"{path} is empty: it must hold at least one row with {WANTED}")
    roles = ", roles " + "/".join(sorted(keys, key=lambda r: (ROLES.index(r) if r in ROLES else len(ROLES), r))) if keys else ""
    decided = "detected" if first else "asked for"
    return Rows(path, format, f'{decided}: key "{format}" in {len(rows):,}/{len(rows):,} rows{roles}', tuple(rows))


def gathered(data: Rows | Tokens | str | Path | Iterable[Row | Mapping[str, Any]]) -> Any:
    """Rows from what a caller has: rows, a path, or an iterable of rows or of objects like those of a JSONL file, counted from 1.

    Rows that are tokenized stay as they are. Raises DataError as `read` does.
    """
    if isinstance(data, Rows | Tokens):
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


def disorder(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the order of roles, as the end of a sentence that begins "these rows …"; None if nothing is.

    Right is: perhaps one system turn, then user and assistant in turn, the assistant last; an assistant's turn may be followed by the
    answers of tools and then by the assistant again.
    """
    roles = [message["role"] for message in messages]
    for role in roles:
        if role not in ROLES:
            return f"hold a turn of the role {role!r} (known: {', '.join(ROLES)})"
    if "system" in roles[1:]:
        return "hold a system turn that is not the first turn"
    turns = roles[roles[:1] == ["system"] :]
    if "assistant" not in turns:
        return "hold no assistant turn"
    if turns[0] != "user":
        return f"begin with {'an' if turns[0] == 'assistant' else 'a'} {turns[0]} turn"
    for one, next_ in zip(turns, turns[1:], strict=False):
        if one == next_ != "tool":
            return f"hold two {one} turns in a row"
        if next_ == "tool" and one == "user":
            return "hold a tool turn that follows no assistant turn"
    return None if turns[-1] == "assistant" else f"end with a {turns[-1]} turn"


def _messages(value: Any, where: str) -> tuple[tuple[dict[str, Any], ...], frozenset[int]]:
    """The turns, and the numbers (from 0) of those that say that they are not learned."""
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else _kind(value)
        raise DataError(f'{where}: "messages" must be a list of {{"role", "content"}}; got {got}')
    turns, untrained = [], set()
    for i, message in enumerate(value):
        at = f"{where}: turn {i + 1}"
        if not isinstance(message, Mapping):
            raise DataError(f'{at} must be an object with "role" and "content"; got {_kind(message)}')
        if not isinstance(message.get("role"), str):
            raise DataError(f'{at} needs "role" as a string; got {_got(message, "role")}')
        if not _learned(message, at):
            untrained.add(i)
        turn = {"role": message["role"], "content": _content(message, at)}
        turn |= {k: v for k, v in message.items() if k not in (*turn, "weight", "train") and v not in (None, "", [], {})}
        _characters(turn, at)
        turns.append(turn)
    return tuple(turns), frozenset(untrained)


def _learned(message: Mapping[str, Any], at: str) -> bool:
    """Is the turn learned, as far as it says so itself?"""
    found = []
    for key in ("weight", "train"):
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1) or (key == "train" and not isinstance(value, bool)):
            wanted = "0 or 1" if key == "weight" else "true or false"
            raise DataError(f'{at} has a "{key}" of {str(value)[:40]!r}: it can be {wanted}')
        if value and message["role"] != "assistant":
            raise DataError(f'{at} ({message["role"]}) asks by its "{key}" to be learned, and only assistant turns are: take the key out')
        found.append(bool(value))
    if len(set(found)) > 1:
        raise DataError(f'{at} says by "weight" that it is {"" if found[0] else "not "}learned, and by "train" the opposite: take one out')
    return not found or found[0]


def _content(message: Mapping[str, Any], at: str) -> str:
    """The content as one string: parts of text are put one after the other; a turn that calls tools may have none."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            said = isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text"
            if not isinstance(part, str) and not said:
                kind = f"a part of the type {str(part.get('type'))[:40]!r}" if isinstance(part, Mapping) else _kind(part)
                raise DataError(f'{at} has {kind} in its "content": finebits learns text, so leave such rows out')
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise DataError(f'{at} needs "content" as a string; got {_got(message, "content")}')
    return content


def _given(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row gives its template beside messages."""
    found = {}
    for key, kind in FOR_TEMPLATE.items():
        value = record.get(key)
        if not value:
            continue
        if not isinstance(value, kind):
            raise DataError(f'{where}: "{key}" must be {"a list" if kind is list else "an object"}; got {_kind(value)}')
        _characters(value, f'{where}: "{key}"')
        found |= value if kind is dict else {key: value}
    if taken := found.keys() & {"conversation", "tokenize", "add_generation_prompt", "chat_template"}:
        raise DataError(f'{where}: "chat_template_kwargs" sets {min(taken)!r}, which finebits sets itself: take it out')
    return found


def _characters(value: Any, at: str) -> None:
    """Raises DataError where a text holds half of a surrogate pair, which no tokenizer takes."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}"
        raise DataError(
            f"{at} holds {half}, half of a character that takes two: mend the text (an emoji was cut) or leave the row out"
        ) from None
    except (TypeError, RecursionError):
        raise DataError(f"{at} is nested too deeply, or is not made of JSON's values") from None


def _got(record: Mapping[str, Any], key: str) -> str:
    return _kind(record[key]) if key in record else f"the keys {_names(record)}"


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removeprefix("\ufeff")  # of a file that was put behind another
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
    except ValueError:  # of int(): Python reads 4300 digits
        raise DataError(f"{path}:{line}: a number has more digits than can be read: write it in quotes, or leave it out") from None


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
