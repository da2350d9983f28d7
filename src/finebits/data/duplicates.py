"""Rows that say the same, within a data set and across its training and held-out rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from finebits.data.finding import Finding, agree, rows_
from finebits.data.rows import Row, Rows


def mark(said: object) -> bytes:
    """What tells one row's content from another's.

    >>> mark(["a", {"b": 1, "c": 2}]) == mark(["a", {"c": 2, "b": 1}])
    True
    """
    return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False, default=str).encode(errors="surrogatepass")).digest()[:16]


def repeated(rows: Sequence[Row]) -> list[list[int]]:
    """The places (from 0) of rows that say the same, for all that are there more than once.

    >>> from finebits.data.rows import shaped
    >>> repeated(shaped([(i, {"text": word}) for i, word in enumerate("abab", 1)], "a.jsonl"))
    [[0, 2], [1, 3]]
    """
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(mark(row.said), []).append(i)
    return [same for same in places.values() if len(same) > 1]


def shared(train: Rows, held: Rows) -> Finding | None:
    """The held-out rows that are training rows too, as a warning; None where there are none.

    >>> from finebits.data.rows import shaped
    >>> a, b = (shaped([(i, {"text": word}) for i, word in enumerate(words, 1)], "a.jsonl") for words in ("abc", "xc"))
    >>> shared(a, b).message
    '1 held-out row says what a training row says: the model is scored on what it was shown'
    """
    known = {mark(row.said) for row in train}
    several = len({row.path for row in held}) > 1 or held.path != train.path
    at = [f"{row.path or held.path}:{row.line}" if several else row.line for row in held if mark(row.said) in known]
    if not at:
        return None
    message = (
        f"{rows_(at).replace('row', 'held-out row')} {agree(at, 'say')} what a training row says: the model is scored on what it was shown"
    )
    return Finding(
        "held_out_overlap", "warn", tuple(at), message, "take them out of one of the two, or let finebits data split part the rows"
    )
