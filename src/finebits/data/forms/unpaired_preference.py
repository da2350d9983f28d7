"""Answers that are wanted or not, as TRL writes them for KTO: `{"prompt": …, "completion": …, "label": true}`, strings or turns of a
conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from finebits.data.error import DataError, kind
from finebits.data.forms._turns import answer_of, prompt_of, template_kwargs, turns
from finebits.data.rows import Row


@dataclass(frozen=True)
class UnpairedPreference:
    """A prompt, an answer, and whether it is wanted.

    >>> row = UnpairedPreference().row({"prompt": "hi", "completion": "ho", "label": True}, 1, "rows.jsonl")
    >>> row.messages[-1]["content"], row.liked
    ('ho', True)
    """

    order: ClassVar[int] = 25
    keys: ClassVar[tuple[str, ...]] = ("label", "prompt", "completion")

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where, label = f"{path}:{line}", record["label"]
        if not isinstance(label, bool):
            fix = "if it is no judgement of the answer, ask for the format prompt_completion"
            raise DataError(f'{where}: "label" must be true or false, whether the answer is wanted; got {kind(label)}: {fix}')
        given, answer = prompt_of(record["prompt"], where), answer_of(record["completion"], where, "completion")
        return replace(turns(line, path, [*given, *answer], len(given), template_kwargs(record, where)), liked=label)
