"""Pairs of answers, as TRL writes them: `{"prompt": …, "chosen": …, "rejected": …}`, each a string or turns of a conversation.

Without a prompt both answers are whole conversations, and what they begin with in common is the prompt. Two strings are a user's turn and the
assistant's, so that the chat template says where each ends.
Deviations: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from finebits.data.forms._turns import turn, turns
from finebits.data.rows import DataError, Row, kind


@dataclass(frozen=True)
class Preference:
    """A prompt, the answer that was liked more, and the other.

    >>> row = Preference().row({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, 1, "rows.jsonl")
    >>> [answer.messages[-1]["content"] for answer in row.answers], row.rejected.liked
    (['4', '5'], False)
    """

    order: ClassVar[int] = 20
    wanted: ClassVar[str] = 'keys "chosen" and "rejected" (with "prompt", or whole conversations)'
    keys: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where, prompt = f"{path}:{line}", record.get("prompt")
        chosen, rejected = (_turns(record[key], "assistant", where, key) for key in self.keys)
        if prompt is None:
            shown = 0
            while shown < min(len(chosen), len(rejected)) - 1 and chosen[shown] == rejected[shown]:
                shown += 1
            before, chosen, rejected = chosen[:shown], chosen[shown:], rejected[shown:]
            if not before:
                raise DataError(f'{where}: "chosen" and "rejected" begin with no turn in common, so there is no prompt: give "prompt" too')
        else:
            before = _turns(prompt, "user", where, "prompt")
        if chosen == rejected:
            raise DataError(f'{where}: "chosen" and "rejected" are the same, and say nothing of what is liked more: leave the row out')
        liked, other = (turns(line, path, [*before, *answer], shown=len(before)) for answer in (chosen, rejected))
        return replace(liked, rejected=replace(other, liked=False))


def _turns(value: Any, role: str, where: str, key: str) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    if not isinstance(value, str):
        raise DataError(f'{where}: "{key}" must be a string or a list of {{"role", "content"}}; got {kind(value)}')
    return [turn(role, value, where, key)]
