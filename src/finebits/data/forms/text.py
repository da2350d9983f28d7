"""Documents: `{"text": "…"}`, every token learned; the model's end token is put behind each. A model that classifies learns the `label` that
stands beside a text instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.data.error import DataError, characters, kind
from finebits.data.rows import Row, labelled


@dataclass(frozen=True)
class Text:
    """One document a row.

    >>> Text().row({"text": "once"}, 1, "rows.jsonl").text
    'once'
    """

    order: ClassVar[int] = 20
    keys: ClassVar[tuple[str, ...]] = ("text",)

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        if not isinstance(record["text"], str):
            raise DataError(f'{path}:{line}: "text" must be a string; got {kind(record["text"])}')
        characters(record["text"], f'{path}:{line}: "text"')
        return Row(line, text=record["text"], path=path, label=labelled(record))
