"""Several files as one data set, and the rows that are held out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finebits.data.rows import DataError, Rows

SHARE = 0.02
LEAST = 20  # held-out rows: the interval of a mean over fewer says little


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several files, in this order; each row keeps the file that it stands in. Raises DataError if they are of two kinds.

    >>> from finebits.data.rows import shaped
    >>> whole = joined([shaped([(1, {"text": "once"})], "a.jsonl"), shaped([(1, {"text": "twice"})], "b.jsonl")])
    >>> whole.path, [row.path for row in whole]
    ('a.jsonl, b.jsonl', ['a.jsonl', 'b.jsonl'])
    """
    if len(parts) == 1:
        return parts[0]
    kinds = {p.format: p.path for p in parts}
    if len(kinds) > 1:
        what = " and ".join(f"{kind} rows ({path})" for kind, path in sorted(kinds.items()))
        raise DataError(f"data.datasets mixes {what}: one recipe trains on one kind", code=2)
    return replace(parts[0], path=", ".join(p.path for p in parts), rows=tuple(r for p in parts for r in p.rows))


def split(rows: Rows, share: float | None = None) -> tuple[Rows, Rows]:
    """Training and held-out rows: every k-th row is held out. With no `share` it is SHARE of them, but at least LEAST, or a quarter where
    there are few.

    >>> from finebits.data.rows import shaped
    >>> train, held = split(shaped([(i, {"text": str(i)}) for i in range(1, 9)], "a.jsonl"), share=0.25)  # every fourth
    >>> [row.line for row in train], [row.line for row in held]
    ([1, 2, 3, 5, 6, 7], [4, 8])
    """
    every = round(1 / (share or SHARE))
    if share is None:
        every = min(every, len(rows) // max(1, min(LEAST, len(rows) // 4)))
    every = max(2, every)
    train = tuple(r for i, r in enumerate(rows) if i % every != every - 1)
    return replace(rows, rows=train), rows[every - 1 :: every]
