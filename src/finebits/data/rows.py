"""Rows of a data set with the lines they stand on: conversations or documents, whatever form they have in their file.

A form (finebits.data.forms) is a file that says by which keys it is known and what a row of it becomes. Which one a file has is seen by the
keys of its first row; all other rows must have the same.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, overload

from finebits import registry
from finebits.data.arrays import Tokens
from finebits.errors import Invalid
from finebits.files import sha256

GIVEN = "the given data"


class DataError(Invalid):
    """The data set cannot be read. `code` is the exit code: 2 if there is no such file or format, 4 if its content is at fault.

    >>> DataError("a.jsonl:3: not JSON").code, DataError("the data set is not there", code=2).code
    (4, 2)
    """

    def __init__(self, message: str, code: int = 4) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Row:
    """One row: `messages`, each {role, content} and what else a template reads, or else `text`; `line` counts from 1, in the file `path`
    where that is known. `untrained` are the turns that are shown and not learned; `template_kwargs` are what the template gets
    beside messages; `label` is what a text or an `image` is, where it says so; a path of one is whole. `rejected` is the same row with an answer
    that was liked less, and what is not `liked` is an answer that was not wanted.

    >>> row = Row(1, messages=({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}))
    >>> row.kind, Row(1, text="once").kind
    ('messages', 'text')
    """

    line: int
    messages: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    path: str = field(default="", compare=False)
    untrained: frozenset[int] = frozenset()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    label: str | int | None = None
    image: Any = field(default=None, hash=False)
    rejected: Row | None = None
    liked: bool = True

    @property
    def answers(self) -> tuple[Row, ...]:
        """The row, and behind it the one with the other answer, where there are two.

        >>> [row.liked for row in Row(1, text="yes", rejected=Row(1, text="no", liked=False)).answers]
        [True, False]
        """
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def kind(self) -> str:
        """What the row is, whatever form it had in its file: messages, text or image.

        >>> Row(1, text="once").kind, Row(1, image=[[0, 255]]).kind
        ('text', 'image')
        """
        return "messages" if self.messages is not None else "text" if self.image is None else "image"

    @property
    def said(self) -> Any:
        """All that the model sees of the row or learns from it, as plain data.

        >>> Row(1, text="once").said, Row(1, text="buy now", label="spam").said
        ('once', ['buy now', 'spam'])
        """
        if self.rejected is not None or not self.liked:
            other = None if self.rejected is None else self.rejected.said
            return [replace(self, rejected=None, liked=True).said, other, self.liked]
        if self.messages is None:
            pictured = [self.image, sha256(Path(self.image))] if isinstance(self.image, str) else self.image
            what = self.text if self.image is None else pictured
            return what if self.label is None else [what, self.label]
        about = {"untrained": sorted(self.untrained), "given": dict(self.template_kwargs)}
        more = [about] if self.untrained or self.template_kwargs else []
        return [*self.messages, *more]


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of one file, what they are (messages, text or image), and in which form they were found.

    >>> rows = shaped([(1, {"text": "once"}), (4, {"text": "twice"})], "a.jsonl")
    >>> len(rows), rows.format, rows[1].line, rows[:1].rows[0].text
    (2, 'text', 4, 'once')
    """

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


def labelled(record: Mapping[str, Any]) -> str | int | None:
    """The label of a record: a name or a number; what is neither is no label.

    >>> labelled({"label": "spam"}), labelled({"label": 3}), labelled({"label": [3]})
    ('spam', 3, None)
    """
    label = record.get("label")
    return label if isinstance(label, str | int) else None


class Form(Protocol):
    """What a row may look like in a file."""

    order: ClassVar[int]  # a row that has the keys of two forms is of the one that comes first
    wanted: ClassVar[str]  # its keys, in words
    keys: ClassVar[tuple[str, ...]]  # by which it is known

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        """A row that has these keys. Raises DataError that names file and line."""
        ...


@functools.cache
def forms() -> dict[str, Form]:
    """The forms by name, in the order in which a row is tried.

    >>> {"messages", "text"} <= forms().keys()
    True
    """
    unordered: dict[str, Any] = {name: registry.load("data.forms", name)() for name in registry.names("data.forms")}
    return dict(sorted(unordered.items(), key=lambda item: item[1].order))


def wanted() -> str:
    """What a row may have, in words."""
    return _or([form.wanted for form in forms().values()])


def _or(choices: Sequence[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]])


OTHERS = (  # how files begin that hold rows in another way
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x1f\x8b", "compressed (gzip)"),
    (b"(\xb5/\xfd", "compressed (zstd)"),
    (b"PK\x03\x04", "an archive (zip)"),
    (b"SQLite format 3", "a database"),
)


def read(path: str | Path, format: str = "auto") -> Rows:
    """The rows of a .jsonl, .json or .txt file.

    A .json file holds a list of rows or one row; a .txt file holds one document per block of lines between blank lines; any other file is
    read as one JSON object a line. Raises DataError, naming the file and the line, if the file is missing or empty, a line is no JSON, a
    row has neither shape, or rows differ in shape.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.json").write_text('[{"text": "once"}, {"text": "twice"}]')
    ...     print([row.text for row in read(f"{folder}/a.json")])
    ['once', 'twice']
    """
    path = Path(path)
    if format != "auto" and format not in forms():
        raise DataError(f"the data format must be auto, {_or([*forms()])}; got {format!r}", code=2)
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "not there"
        raise DataError(f"the data set {path} is {what}: give a .jsonl, .json or .txt file", code=2)
    content = path.read_bytes()
    if kind := next((k for start, k in OTHERS if content.startswith(start)), "a table" if path.suffix in (".csv", ".tsv") else None):
        raise DataError(f"{path} is {kind}: write its rows into a .jsonl file, one JSON object a line", code=2)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: byte {e.object[e.start]:#04x} is not UTF-8: save the file as UTF-8") from None

    if path.suffix == ".txt":
        if format not in ("auto", "text"):
            raise DataError(f"{path} is plain text and cannot hold {format}: write one JSON object a line into a .jsonl file", code=2)
        rows = tuple(Row(line, text=block, path=str(path)) for line, block in _blocks(text))
        if not rows:
            raise DataError(f"{path} is empty: a .txt data set holds one document per block of lines between blank lines")
        return Rows(str(path), "text", f"a .txt file with {len(rows):,} blocks between blank lines", rows)
    return shaped(_json_rows(text, path) if path.suffix == ".json" else _jsonl_rows(text, path), str(path), format)


def shaped(records: Iterable[tuple[int, Any]], path: str, format: str = "auto") -> Rows:
    """Rows from (line, parsed object) pairs; `path` is what errors call them. Raises DataError as `read` does.

    >>> shaped([(1, {"text": "once", "id": 7})], "a.jsonl").why
    'detected: key "text" in 1/1 rows'
    >>> shaped([(1, {"text": "once"}), (2, {"txt": "twice"})], "a.jsonl")
    Traceback (most recent call last):
        ...
    finebits.data.rows.DataError: a.jsonl:2: wanted a key "text" as in line 1 ("format: auto" needs rows of one shape); found the keys 'txt'
    """
    rows: list[Row] = []
    first, form = 0, None if format == "auto" else forms()[format]
    for line, record in records:
        where = f"{path}:{line}"
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: a row must be a JSON object with {wanted()}; got {kind(record)}")
        if form is None:
            form = next((f for f in forms().values() if record.keys() >= {*f.keys}), None)
            if form is None:
                raise DataError(f"{where}: found the keys {names(record)}; wanted {wanted()}")
            first = line
        if lost := [key for key in form.keys if key not in record]:
            before = f' as in line {first} ("format: auto" needs rows of one shape)' if first else ""
            raise DataError(f'{where}: wanted a key "{lost[0]}"{before}; found the keys {names(record)}')
        rows.append(form.row(record, line, path))
    if form is None or not rows:
        raise DataError(f"{path} is empty: it must hold at least one row with {wanted()}")
    keys = " and ".join(f'"{key}"' for key in form.keys)
    why = f"{'detected' if first else 'asked for'}: key{'s' if len(form.keys) > 1 else ''} {keys} in {len(rows):,}/{len(rows):,} rows"
    roles = dict.fromkeys(message["role"] for row in rows for message in row.messages or ())
    usual = ("system", "user", "assistant", "tool")
    listed = "/".join(sorted(roles, key=lambda r: (usual.index(r) if r in usual else len(usual), r)))
    return Rows(path, rows[0].kind, f"{why}{', roles ' if listed else ''}{listed}", tuple(rows))


@overload
def gathered(data: Tokens) -> Tokens: ...
@overload
def gathered(data: Rows | str | Path | Iterable[Row | Mapping[str, Any]]) -> Rows: ...
def gathered(data: Rows | Tokens | str | Path | Iterable[Row | Mapping[str, Any]]) -> Rows | Tokens:
    """Rows from what a caller has: rows, a path, or an iterable of rows or of objects like those of a JSONL file, counted from 1.

    Rows that are tokenized stay as they are. Raises DataError as `read` does.

    >>> [row.text for row in gathered([{"text": "once"}, {"text": "twice"}])]
    ['once', 'twice']
    """
    if isinstance(data, Rows | Tokens):
        return data
    if isinstance(data, str | Path):
        return read(data)
    items = list(data)
    rows = tuple(row for row in items if isinstance(row, Row))
    if rows:
        kinds = {row.kind for row in rows} | ({"no Row"} if len(rows) < len(items) else set())
        if len(kinds) > 1:
            raise DataError(f"{GIVEN} mixes rows of several kinds ({', '.join(sorted(kinds))}): give rows of one kind")
        return Rows(GIVEN, kinds.pop(), "given as rows", rows)
    return shaped(enumerate(items, 1), GIVEN)


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removeprefix("\ufeff")  # of a file that was put behind another
        if line.strip():
            yield number, _parsed(line, path, number, " (each line must be one JSON object)", _skip(line, 0))[0]


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
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


def characters(value: Any, at: str) -> None:
    """Raises DataError where a text holds half of a surrogate pair, which no tokenizer takes.

    >>> characters("of any language: 語", "a.jsonl:1")
    >>> characters([object()], "a.jsonl:1")
    Traceback (most recent call last):
        ...
    finebits.data.rows.DataError: a.jsonl:1 is nested too deeply, or is not made of JSON's values
    """
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}"
        raise DataError(
            f"{at} holds {half}, half of a character that takes two: mend the text (an emoji was cut) or leave the row out"
        ) from None
    except (TypeError, RecursionError):
        raise DataError(f"{at} is nested too deeply, or is not made of JSON's values") from None


def got(record: Mapping[str, Any], key: str) -> str:
    return kind(record[key]) if key in record else f"the keys {names(record)}"


def names(record: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(key)[:40]) for key in list(record)[:12]) or "(none)"


def kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")
