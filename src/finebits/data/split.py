"""The rows that are held out of a data set."""

from __future__ import annotations

from dataclasses import replace

from finebits.data.rows import Rows

SHARE = 0.02
LEAST = 20  # held-out rows: the interval of a mean over fewer says little


def split(rows: Rows, share: float | None = None) -> tuple[Rows, Rows]:
    """Training and held-out rows: every k-th row is held out. With no `share` it is SHARE of them, but at least LEAST, or a quarter where
    there are few; from 1 on it is how many, all over the rows, but for one that is left to train on.

    >>> from finebits.data.rows import shaped
    >>> train, held = split(shaped([(i, {"text": str(i)}) for i in range(1, 9)], "a.jsonl"), share=0.25)  # every fourth
    >>> [row.line for row in train], [row.line for row in held]
    ([1, 2, 3, 5, 6, 7], [4, 8])
    >>> [row.line for row in split(shaped([(i, {"text": str(i)}) for i in range(1, 9)], "a.jsonl"), share=3)[1]]
    [2, 5, 8]
    """
    if share is not None and share >= 1:
        many = min(int(share), len(rows) - 1)
        out = {(k + 1) * len(rows) // many - 1 for k in range(many)}
        parts = (tuple(r for i, r in enumerate(rows) if (i in out) is held) for held in (False, True))
        train, held = (replace(rows, rows=part) for part in parts)
        return train, held
    every = round(1 / (share or SHARE))
    if share is None:
        every = min(every, len(rows) // max(1, min(LEAST, len(rows) // 4)))
    every = max(2, every)
    train = tuple(r for i, r in enumerate(rows) if i % every != every - 1)
    return replace(rows, rows=train), rows[every - 1 :: every]
