"""Single answers that were wanted or not, as TRL writes them: `{"prompt": …, "completion": …, "label": true}`.

Prompt and completion are two strings or two lists of turns, as in rows of prompt_completion.
Deviations: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from finebits.data.forms._turns import turn, turns
from finebits.data.rows import DataError, Row, kind


@dataclass(frozen=True)
class KTO:
    """A prompt, an answer, and whether it was wanted.

    >>> KTO().row({"prompt": "2 + 2?", "completion": "5", "label": False}, 1, "rows.jsonl").liked
    False
    """

    order: ClassVar[int] = 25
    wanted: ClassVar[str] = 'keys "prompt", "completion" and "label" (true or false)'
    keys: ClassVar[tuple[str, ...]] = ("prompt", "completion", "label")

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where, label = f"{path}:{line}", record["label"]
        if label not in (True, False):
            raise DataError(f'{where}: "label" of an answer must be true (wanted) or false (not); got {kind(label)}')
        sides = []
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            value = record[key]
            if not (isinstance(value, str) or (isinstance(value, list) and value)):
                raise DataError(f'{where}: "{key}" must be a string or a list of {{"role", "content"}}; got {kind(value)}')
            sides.append([turn(role, value, where, key)] if isinstance(value, str) else value)
        return replace(turns(line, path, [*sides[0], *sides[1]], shown=len(sides[0])), liked=bool(label))
