"""Rows that were tokenized before: `{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}`, with the tokenizer of the model that is tuned.

A label is the id at its place, or −100 where nothing is learned; without `labels` every token is. Places where an `attention_mask` is 0
are padding,
and are left out. No template is asked, and no end token put behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.data.error import DataError, kind
from finebits.data.rows import Row
from finebits.losses import IGNORED


@dataclass(frozen=True)
class Pretokenised:
    """Ids, and which of them are learned.

    >>> Pretokenised().row({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, 1, "rows.jsonl").tokens
    ((5, 6, 7), (False, True, True))
    """

    order: ClassVar[int] = 45
    keys: ClassVar[tuple[str, ...]] = ("input_ids",)

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where = f"{path}:{line}"
        ids = _numbers(record["input_ids"], where, "input_ids", 0)
        if not ids:
            raise DataError(f'{where}: "input_ids" is an empty list: leave the row out')
        labels = ids if record.get("labels") is None else _numbers(record["labels"], where, "labels", IGNORED)
        kept = [1] * len(ids) if record.get("attention_mask") is None else _numbers(record["attention_mask"], where, "attention_mask", 0)
        for key, values in (("labels", labels), ("attention_mask", kept)):
            if len(values) != len(ids):
                raise DataError(f'{where}: "{key}" has {len(values):,} numbers and "input_ids" {len(ids):,}: there is one for each token')
        if (i := next((i for i, (id, y) in enumerate(zip(ids, labels, strict=True)) if y not in (id, IGNORED)), None)) is not None:
            raise DataError(
                f"{where}: the label of token {i + 1} is {labels[i]}: it can be the id itself ({ids[i]}) or {IGNORED}, not learned"
            )
        some = [(id, y != IGNORED) for id, y, keep in zip(ids, labels, kept, strict=True) if keep]
        return Row(line, path=path, tokens=(tuple(id for id, _ in some), tuple(learned for _, learned in some)))


def _numbers(value: Any, where: str, key: str, least: int) -> list[int]:
    if not isinstance(value, list):
        raise DataError(f'{where}: "{key}" must be a list of whole numbers; got {kind(value)}')
    for v in value:
        if type(v) is not int or not (v == least or 0 <= v < 1 << 31):
            raise DataError(f'{where}: "{key}" must be a list of whole numbers from 0 on; it holds {str(v)[:40]}')
    return value
