"""The rows that are held out of a data set."""

from __future__ import annotations

from dataclasses import replace

from finebits.data.error import DataError
from finebits.data.rows import Rows

SHARE = 0.02
LEAST = 20  # held-out rows: the interval of a mean over fewer says little


def split(rows: Rows, share: float | None = None) -> tuple[Rows, Rows]:
    """Training and held-out rows. `share` is the share of the rows that is held out, or from 1 on how many, spread over all of them; with none
    it is SHARE of them, but at least LEAST, or a quarter where there are few. Raises DataError where so many leave nothing to train on.

    >>> from finebits.data.rows import shaped
    >>> train, held = split(shaped([(i, {"text": str(i)}) for i in range(1, 9)], "a.jsonl"), share=0.25)  # every fourth
    >>> [row.line for row in train], [row.line for row in held]
    ([1, 2, 3, 5, 6, 7], [4, 8])
    >>> [row.line for row in split(shaped([(i, {"text": str(i)}) for i in range(1, 9)], "a.jsonl"), share=3)[1]]
    [2, 5, 8]
    """
    count = len(rows)
    if share is None:
        every = max(2, min(round(1 / SHARE), count // max(1, min(LEAST, count // 4))))
        out = {*range(every - 1, count, every)}
    else:
        many = int(share) if share >= 1 else max(1, round(share * count))
        if many >= count:
            raise DataError(f"data.test_split_size holds out {many:,} rows, and there are {count:,}: lower it, or name data.held_out")
        out = {(k + 1) * count // many - 1 for k in range(many)}
    train, held = (tuple(r for i, r in enumerate(rows) if (i in out) is held) for held in (False, True))
    return replace(rows, rows=train), replace(rows, rows=held)
