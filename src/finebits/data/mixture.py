"""How many rows of each data set are learned: a share of its own rows (`fraction`), or a share of the whole (`weight`).

With weights w_i the mixture has as many rows as it can have without taking any twice: for p_i = w_i / Σ w and n_i rows,

    N = min_i n_i / p_i,    N p_i of each, rounded down, one at least

Which rows these are is drawn by the seed, apart for every data set; they stay in their order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from finebits.data.error import DataError
from finebits.data.rows import Rows


def mixed(parts: Sequence[Rows], fractions: Sequence[float | None], weights: Sequence[float | None], seed: int) -> list[Rows]:
    """The rows that are taken of each part. Raises DataError where some parts have a weight and others have none.

    >>> from finebits.data.rows import shaped
    >>> a, b = (shaped([(i, {"text": str(i)}) for i in range(1, n + 1)], f"{n}.jsonl") for n in (4, 12))
    >>> [len(part) for part in mixed([a, b], [None, None], [1, 2], seed=0)], [len(part) for part in mixed([b], [0.25], [None], seed=0)]
    ([4, 8], [3])
    """
    taken = [
        _some(part, seed, max(1, round(f * len(part)))) if f is not None and f < 1 else part
        for part, f in zip(parts, fractions, strict=True)
    ]
    if all(w is None for w in weights):
        return taken
    shares = [w for w in weights if w is not None]
    if len(shares) < len(parts):
        lost = next(part.path for part, w in zip(parts, weights, strict=True) if w is None)
        raise DataError(f"data.datasets gives a weight to some data sets and none to {lost}: weigh all of them, or none", code=2)
    p = [w / sum(shares) for w in shares]
    whole = min(len(part) / share for part, share in zip(taken, p, strict=True))
    counts = [max(1, int(whole * share + 1e-9)) for share in p]
    return [_some(part, seed, n) for part, n in zip(taken, counts, strict=True)]


def _some(rows: Rows, seed: int, count: int) -> Rows:
    if count >= len(rows):
        return rows
    drawn = random.Random(hashlib.sha256(f"{seed}/{rows.path}".encode()).digest()).sample(range(len(rows)), count)
    why = f"{rows.why}; {count:,} of {len(rows):,} rows are taken"
    return replace(rows, why=why, rows=tuple(rows[i] for i in sorted(drawn)))
