"""Rows of a data set with the lines they stand on: conversations, documents, pairs of answers, whatever form they have in their file.

A form (finebits.data.forms) is a file that says by which keys it is known and what a row of it becomes. Which one a file has is seen by the
keys of its first row; all other rows must have the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, overload

from finebits import registry
from finebits.data.arrays import Tokens
from finebits.data.error import DataError, kind, names
from finebits.data.reading import Found, found
from finebits.files import sha256

GIVEN = "the given data"


@dataclass(frozen=True)
class Row:
    """One row: `messages`, each {role, content} and what else a template reads, or else `text`; `line` counts from 1, in the file `path`
    where that is known. `untrained` are the turns that are shown and not learned; `template_kwargs` are what the template gets
    beside messages; `label` is what a text or an `image` is, where it says so; a path of one is whole. `tokens` are (ids, whether each is
    learned) of a row that was tokenized before. `rejected` is the same row with an answer that was liked less, and what is not `liked` is an
    answer that was not wanted.

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
    tokens: tuple[tuple[int, ...], tuple[bool, ...]] | None = None
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
        """What the row is, whatever form it had in its file: messages, text, image or tokens.

        >>> Row(1, text="once").kind, Row(1, image=[[0, 255]]).kind
        ('text', 'image')
        """
        if self.tokens is not None:
            return "tokens"
        return "messages" if self.messages is not None else "text" if self.image is None else "image"

    @property
    def turns(self) -> Iterator[Mapping[str, Any]]:
        """All turns that the row holds.

        >>> [*Row(1, text="once").turns]
        []
        """
        for answer in self.answers:
            yield from answer.messages or ()

    @property
    def said(self) -> Any:
        """All that the model sees of the row or learns from it, as plain data.

        >>> Row(1, text="once").said, Row(1, text="buy now", label="spam").said
        ('once', ['buy now', 'spam'])
        """
        if self.rejected is not None or not self.liked:
            other = None if self.rejected is None else self.rejected.said
            return [replace(self, rejected=None, liked=True).said, other, self.liked]
        about = {"untrained": sorted(self.untrained), "given": dict(self.template_kwargs)}
        more = [about] if self.untrained or self.template_kwargs else []
        if self.tokens is not None:
            return [[*part] for part in self.tokens]
        if self.messages is None:
            pictured = [self.image, sha256(Path(self.image))] if isinstance(self.image, str) else self.image
            what = self.text if self.image is None else pictured
            return what if self.label is None else [what, self.label]
        return [*self.messages, *more]


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of one file, what they are (`Row.kind`), and in which form they were found.

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
    """The label of a record: a name or a whole number (a column with gaps holds those as 3.0); what is neither is no label.

    >>> labelled({"label": "spam"}), labelled({"label": 3.0}), labelled({"label": 0.5})
    ('spam', 3, None)
    """
    label: Any = record.get("label")
    label = label.item() if type(label).__module__ == "numpy" and getattr(label, "ndim", 1) == 0 else label
    label = int(label) if isinstance(label, float) and label.is_integer() else label
    return label if isinstance(label, str | int) else None


class Form(Protocol):
    """What a row may look like in a file."""

    order: ClassVar[int]  # a row that has the keys of two forms is of the one that comes first
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
    """What a row may have, in words.

    >>> wanted().startswith('a key "messages", "conversations", '), '"instruction" with "output"' in wanted()
    (True, True)
    """
    quoted = sorted(([f'"{key}"' for key in form.keys] for form in forms().values()), key=len)
    return "a key " + _or([" with ".join(filter(None, (keys[0], " and ".join(keys[1:])))) for keys in quoted])


def _or(choices: Sequence[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]])


def read(
    path: str | Path,
    format: str = "auto",
    split: str | None = None,
    name: str | None = None,
    data_files: Sequence[str] = (),
    revision: str | None = None,
) -> Rows:
    """The rows of a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, .md, or one of these compressed by gzip, bzip2 or xz), of a
    folder or
    a pattern of such files, or of a hub id.

    A .json file holds a list of rows or one row; a .txt file holds one document per block of lines between blank lines, an .md file one; the
    first line of a table names its columns; any other file is read as one JSON object a line. `split`, `name` (of a configuration),
    `data_files` (patterns) and `revision` choose inside a folder or a hub id. Raises DataError, naming the file and the line, if the file is
    missing or empty or of another kind, a line is no JSON, a row has neither shape, or rows differ in shape.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.json").write_text('[{"text": "once"}, {"text": "twice"}]')
    ...     print([row.text for row in read(f"{folder}/a.json")])
    ['once', 'twice']
    """
    if format != "auto" and format not in forms():
        raise DataError(f"the data format must be auto, {_or([*forms()])}; got {format!r}", code=2)
    files, why = found(path, split, name, data_files, revision)
    rows = joined([_shaped(file, format) for file in files], f"{path} holds")
    return replace(rows, path=str(path) if len(files) > 1 else rows.path, why=f"{why}: {rows.why}" if why else rows.why)


def _shaped(file: Found, format: str) -> Rows:
    if not file.text:
        rows = shaped(file.records, file.path, format)
        return replace(rows, why=file.why + rows.why)
    if format not in ("auto", "text"):
        raise DataError(f"{file.path} is plain text and cannot hold {format}: write one JSON object a line into a .jsonl file", code=2)
    rows = tuple(Row(line, text=record["text"], path=file.path) for line, record in file.records)
    if not rows:
        raise DataError(f"{file.path} is empty: a text file holds documents to learn")
    return Rows(file.path, "text", file.why, rows)


def joined(parts: Sequence[Rows], where: str = "data.datasets mixes") -> Rows:
    """The rows of several files, in this order; each row keeps the file that it stands in. Raises DataError if they are of two kinds.

    >>> whole = joined([shaped([(1, {"text": "once"})], "a.jsonl"), shaped([(1, {"text": "twice"})], "b.jsonl")])
    >>> whole.path, [row.path for row in whole]
    ('a.jsonl, b.jsonl', ['a.jsonl', 'b.jsonl'])
    """
    if len(parts) == 1:
        return parts[0]
    kinds = {p.format: p.path for p in parts}
    if len(kinds) > 1:
        what = " and ".join(f"{kind} rows ({path})" for kind, path in sorted(kinds.items()))
        raise DataError(f"{where} {what}: one recipe trains on one kind", code=2)
    said = [f"{p.path}: {p.why}" for p in parts[:SAID]] + ([f"and {len(parts) - SAID} more"] if len(parts) > SAID else [])
    return replace(parts[0], path=", ".join(p.path for p in parts), why="; ".join(said), rows=tuple(r for p in parts for r in p.rows))


SAID = 3  # files of which it is said how they were read


def shaped(records: Iterable[tuple[int, Any]], path: str, format: str = "auto") -> Rows:
    """Rows from (line, parsed object) pairs; `path` is what errors call them. Raises DataError as `read` does.

    >>> shaped([(1, {"text": "once", "id": 7})], "a.jsonl").why
    'detected: key "text" in 1/1 rows'
    >>> shaped([(1, {"text": "once"}), (2, {"txt": "twice"})], "a.jsonl")
    Traceback (most recent call last):
        ...
    finebits.data.error.DataError: a.jsonl:2: wanted a key "text" as in line 1 ("format: auto" needs rows of one shape); found the keys 'txt'
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
    roles = dict.fromkeys(message["role"] for row in rows for message in row.turns)
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
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        came = f"a mapping with the keys {names(cast(Any, data))}" if isinstance(data, Mapping) else f"a {type(data).__name__}"
        raise DataError(f"{GIVEN} must be a path, or rows one after the other, such as a list of {{'messages': …}}; got {came}")
    if hasattr(data, "iterrows"):  # a table of pandas, whose own iteration gives the names of its columns
        data = cast(Any, data).to_dict("records")
    items = list(cast(Any, data))
    rows = tuple(row for row in items if isinstance(row, Row))
    if rows:
        kinds = {row.kind for row in rows} | ({"no Row"} if len(rows) < len(items) else set())
        if len(kinds) > 1:
            raise DataError(f"{GIVEN} mixes rows of several kinds ({', '.join(sorted(kinds))}): give rows of one kind")
        return Rows(GIVEN, kinds.pop(), "given as rows", rows)
    return shaped(enumerate(items, 1), GIVEN)
