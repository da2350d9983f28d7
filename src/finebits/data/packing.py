"""Packing: several rows in one, as full as they go, and none sees another.

Rows are put into packs of `max_length` tokens by best fit, the longest first (best-fit decreasing: at most 11/9 of the least number of
packs, and a
few; D. S. Johnson, Near-optimal bin packing algorithms, 1973). In a pack positions begin anew with every row, attention stays within a row, and
the first token of a row is not predicted from the last of another: the loss is that of the rows apart.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finebits.data.arrays import Example, Tokens
from finebits.data.tokens import to_batch
from finebits.errors import Invalid
from finebits.losses import IGNORED


def best_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Packs of row numbers, each of at most `max_length` tokens: every row, the longest first, goes where it leaves least room. Raises
    Invalid for a
    row that is longer.

    >>> best_fit([3, 9, 6, 2, 1], 10)
    [[1, 4], [2, 0], [3]]
    """
    packs: list[list[int]] = []
    open_: list[tuple[int, int]] = []  # (room, pack), sorted
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        length = lengths[row]
        if length > max_length:
            raise Invalid(f"row {row + 1} has {length:,} tokens, and a pack holds {max_length:,}: cut it first")
        at = bisect.bisect_left(open_, (length, -1))
        if at < len(open_):
            room, pack = open_.pop(at)
            packs[pack].append(row)
        else:
            room, pack = max_length, len(packs)
            packs.append([row])
        if room > length:
            bisect.insort(open_, (room - length, pack))
    return packs


@dataclass(frozen=True)
class Pack:
    """Rows one after the other; `segments` are their lengths.

    >>> Pack([5, 6, 7, 8], [-100, 6, -100, 8], [2, 2]).segments
    [2, 2]
    """

    input_ids: list[int]
    labels: list[int]
    segments: list[int]


@dataclass(frozen=True)
class Packs:
    """How the rows of some tokens are packed: `rows[i]` are the numbers of those in pack i.

    >>> from finebits.data.arrays import Example
    >>> packs = Packs.of(Tokens.of([Example([5, 6, 7], [5, 6, 7], 1), Example([5, 8], [-100, 8], 2)], 3, True), 5)
    >>> packs.rows, packs.lengths, packs.labelled, packs[0]
    ([[0, 1]], [5], [3], Pack(input_ids=[5, 6, 7, 5, 8], labels=[-100, 6, 7, -100, 8], segments=[3, 2]))
    """

    tokens: Tokens
    rows: list[list[int]]

    @classmethod
    def of(cls, tokens: Tokens, max_length: int) -> Packs:
        return cls(tokens, best_fit(tokens.lengths, max_length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Pack:
        ids, labels, segments = list[int](), list[int](), list[int]()
        for row in self.rows[i]:
            e = self.tokens[row]
            ids += e.input_ids
            labels += [IGNORED, *e.labels[1:]]  # nothing of its own stands before the first
            segments.append(len(e.input_ids))
        return Pack(ids, labels, segments)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every pack."""
        own = self.tokens.lengths
        return [sum(own[r] for r in pack) for pack in self.rows]

    @property
    def labelled(self) -> list[int]:
        """Trained tokens of every pack."""
        own = self.tokens.labelled
        return [sum(own[r] for r in pack) for pack in self.rows]

    @property
    def filled(self) -> float:
        """Which share of the packs is tokens of rows, of packs as long as the longest."""
        lengths = self.lengths
        return sum(lengths) / (len(lengths) * max(lengths)) if lengths else 0.0


def batch(packs: Sequence[Mapping[str, Sequence[int]]], pad_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """`input_ids`, `labels` and `position_ids`, each (packs, longest) of int64. Positions begin anew with every row, and with the padding on the
    right, which is a row of its own: transformers makes a mask of them that lets a row see itself alone, where no other mask is given.

    >>> made = batch([vars(Pack([5, 6, 7, 8, 9], [-100, 6, -100, 8, 9], [2, 3]))], pad_id=0, multiple=4)
    >>> made["position_ids"], sorted(made)
    (tensor([[0, 1, 0, 1, 2, 0, 1, 2]]), ['input_ids', 'labels', 'position_ids'])
    """
    examples = [Example(list(p["input_ids"]), list(p["labels"]), "") for p in packs]
    made = to_batch(examples, pad_id, multiple)
    width = made["input_ids"].shape[1]
    places = []
    for pack in packs:
        rest = width - sum(pack["segments"])
        places.append(torch.cat([torch.arange(n) for n in (*pack["segments"], rest)]))
    return {"input_ids": made["input_ids"], "labels": made["labels"], "position_ids": torch.stack(places)}
