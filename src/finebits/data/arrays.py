"""Rows as the model sees them, in arrays, and a file of them that says what it was made of: rows are tokenized once and read by many."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.files import replaced
from finebits.losses import IGNORED
from finebits.tensorfile import Entry, Stored, write

SCHEMA = "finebits.tokens/1"


@dataclass(frozen=True)
class Example:
    """One row as the model sees it. `labels[i]` is `input_ids[i]` where token i is trained, else −100; `truncated` tokens were cut off. The row
    stands in `line` of the file `path`; what is not `liked` is an answer that was not wanted.

    >>> row = Example([5, 6, 7], [-100, 6, 7], line=3, path="a.jsonl")  # the first token is seen and not learned
    >>> row.where, row.said
    ('a.jsonl:3', [[5, 6, 7], [-100, 6, 7]])
    """

    input_ids: list[int]
    labels: list[int]
    line: int | str
    truncated: int = 0
    path: str = field(default="", compare=False)
    liked: bool = field(default=True, repr=False)

    @property
    def where(self) -> str:
        """path:line."""
        return f"{self.path}:{self.line}"

    @property
    def said(self) -> Any:
        """All that the model sees of the row or learns from it, as plain data."""
        return [self.input_ids, self.labels]


@dataclass(frozen=True, eq=False)
class Tokens(Sequence[Example]):
    """Examples in arrays: row i is `ids[ends[i - 1]:ends[i]]`, and `trained` says of which of these the loss is taken. None is longer than
    `max_length` tokens; `assistant_only_loss` says what was to be trained.

    >>> t = Tokens.of([Example([5, 6, 7], [-100, 6, 7], 1, path="a.jsonl"), Example([5, 8], [-100, 8], 2)], 3, True)
    >>> t.lengths, t.labelled, t[1].input_ids, t[:1][0].where
    ([3, 2], [2, 1], [5, 8], 'a.jsonl:1')
    """

    ids: Tensor  # (t,) int32
    trained: Tensor  # (t,) bool
    ends: Tensor  # (r,) int64
    lines: tuple[tuple[str, int | str, int], ...]  # of each row: its file, its line, and how many tokens were cut off
    max_length: int
    assistant_only_loss: bool
    unwanted: frozenset[int] = frozenset()  # rows whose answers were not wanted

    @classmethod
    def of(cls, examples: Iterable[Example], max_length: int, assistant_only_loss: bool) -> Tokens:
        """The same in arrays.

        >>> tokens = Tokens.of([Example([5, 6, 7], [-100, 6, 7], 1), Example([5, 8], [-100, 8], 2)], 3, True)
        >>> tokens.ids, tokens.ends
        (tensor([5, 6, 7, 5, 8], dtype=torch.int32), tensor([3, 5]))
        """
        ids, trained, lengths, lines = list[Tensor](), list[Tensor](), list[int](), list[tuple[str, int | str, int]]()
        unwanted = list[int]()
        for e in examples:
            unwanted += [] if e.liked else [len(lines)]
            ids.append(torch.tensor(e.input_ids, dtype=torch.int32))
            trained.append(torch.tensor(e.labels, dtype=torch.int64) != IGNORED)
            lengths.append(len(e.input_ids))
            lines.append((e.path, e.line, e.truncated))
        ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        empty = torch.zeros(0, dtype=torch.int32)
        columns = torch.cat([empty, *ids]), torch.cat([empty.bool(), *trained]), ends, tuple(lines)
        return cls(*columns, max_length, assistant_only_loss, frozenset(unwanted))

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Tokens: ...
    def __getitem__(self, i: int | slice) -> Example | Tokens:
        if isinstance(i, slice):
            return Tokens.of((self[n] for n in range(*i.indices(len(self)))), self.max_length, self.assistant_only_loss)
        n = range(len(self))[i]
        span = slice(int(self.ends[n - 1]) if n else 0, int(self.ends[n]))
        ids, (path, line, truncated) = self.ids[span], self.lines[n]
        labels = torch.where(self.trained[span], ids, IGNORED).tolist()
        return Example(ids.tolist(), labels, line, truncated, path, n not in self.unwanted)

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row.

        >>> Tokens.of([Example([5, 6, 7], [-100, 6, 7], 1), Example([5, 8], [-100, 8], 2)], 3, True).lengths
        [3, 2]
        """
        return (self.ends - self._starts).tolist()

    @property
    def _starts(self) -> Tensor:
        return torch.cat([self.ends.new_zeros(1), self.ends])[:-1]

    @property
    def labelled(self) -> list[int]:
        """Trained tokens of every row that have one before them.

        >>> Tokens.of([Example([5, 6, 7], [5, 6, 7], 1)], 3, False).labelled  # nothing says what the first token is to be
        [2]
        """
        learned = self.trained.clone()
        learned[self._starts[self._starts < self.ends]] = False
        sums = torch.cat([self.ends.new_zeros(1), learned.cumsum(0)])
        return (sums[self.ends] - sums[self._starts]).tolist()

    def within(self, max_length: int, assistant_only_loss: bool) -> Tokens:
        """The same with no row longer than `max_length`. Raises Invalid where other tokens are to be trained than when they were made.

        >>> tokens = Tokens.of([Example([5, 6, 7], [-100, 6, 7], 1)], 3, True)
        >>> tokens.within(2, True)[0]
        Example(input_ids=[5, 6], labels=[-100, 6], line=1, truncated=1, path='')
        """
        if assistant_only_loss != self.assistant_only_loss:
            mode = f"assistant_only_loss={self.assistant_only_loss}"
            raise Invalid(f"the rows were tokenized with {mode}, and {assistant_only_loss} is asked for: give the rows themselves")
        if max(self.lengths, default=0) <= max_length:
            return self
        cut = ((e, len(e.input_ids[max_length:])) for e in self)
        kept = (replace(e, input_ids=e.input_ids[:max_length], labels=e.labels[:max_length], truncated=e.truncated + n) for e, n in cut)
        return Tokens.of(kept, max_length, assistant_only_loss)


def save(path: Path, parts: Mapping[str, Tokens], about: Mapping[str, Any]) -> None:
    """Write some tokens under their names, and what they were made of and for (values of JSON), in one step.

    >>> import tempfile
    >>> tokens = Tokens.of([Example([5, 6], [-100, 6], 1)], 2, True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder, "tokens.safetensors"), {"train": tokens}, {"rows": "a.jsonl"})
    ...     parts, about = load(Path(folder, "tokens.safetensors"))
    >>> parts["train"][0].input_ids, about
    ([5, 6], {'rows': 'a.jsonl'})
    """
    entries = {f"{name}.{part}": Entry.of(getattr(t, part)) for name, t in parts.items() for part in ("ids", "trained", "ends")}
    notes = {
        name: {"lines": t.lines, "max_length": t.max_length, "assistant_only_loss": t.assistant_only_loss}
        | ({"unwanted": sorted(t.unwanted)} if t.unwanted else {})
        for name, t in parts.items()
    }
    with replaced(path) as new:
        write(new, entries, {"schema": SCHEMA, "made": json.dumps(notes), "about": json.dumps(about)})


def load(path: Path) -> tuple[dict[str, Tokens], dict[str, Any]]:
    """What `save` wrote. Raises Invalid where the file is no such file."""
    stored = Stored(path)
    if stored.metadata.get("schema") != SCHEMA:
        raise Invalid(f"{path} is not of schema {SCHEMA}: begin anew with --overwrite, or name another output_dir")
    parts = {}
    for name, note in json.loads(stored.metadata["made"]).items():
        ids, trained, ends = (stored[f"{name}.{part}"] for part in ("ids", "trained", "ends"))
        lines = tuple((path, line, cut) for path, line, cut in note["lines"])
        unwanted = frozenset(note.get("unwanted", ()))
        parts[name] = Tokens(ids, trained, ends, lines, note["max_length"], note["assistant_only_loss"], unwanted)
    return parts, json.loads(stored.metadata["about"])
