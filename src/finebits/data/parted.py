"""A data set in two: rows to train on, and rows to hold out, which share nothing.

Records that say the same stay together, so no held-out row is a training row too. Which are held out is drawn by the seed; both parts keep
the order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from finebits.data.duplicates import mark
from finebits.data.error import DataError
from finebits.data.split import LEAST, SHARE


def parted(records: Sequence[Any], share: float | None = None, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """(to train on, held out). With no `share` it is 2%, but at least 20 rows, or a quarter of few. Raises DataError where all rows say
    the same.

    >>> train, held = parted([{"text": word} for word in "aabbccdd"], share=0.25)
    >>> len(train), len(held), {r["text"] for r in train} & {r["text"] for r in held}
    (6, 2, set())
    """
    groups: dict[bytes, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(mark(record), []).append(i)
    if len(groups) < 2:
        raise DataError(
            f"there {'is 1 row' if len(records) == 1 else f'are {len(records):,} rows that all say the same'}: nothing is left to hold out"
        )
    count = round(len(records) * share) if share is not None else max(round(len(records) * SHARE), min(LEAST, len(records) // 4))
    drawn = list(groups.values())
    random.Random(seed).shuffle(drawn)
    held: set[int] = set()
    for group in drawn[:-1]:
        if len(held) >= max(1, count):
            break
        held.update(group)
    return [r for i, r in enumerate(records) if i not in held], [records[i] for i in sorted(held)]
