"""Pairs of answers, as TRL writes them: `{"prompt": …, "chosen": …, "rejected": …}`, strings or turns of a conversation, for DPO, ORPO and
their like.

Without `prompt` it is what both begin with: of turns the first that they share, of strings the shared words. Where `chosen` and `rejected` begin
with the turns of the prompt themselves, these are taken off. Strings are a user's turn and an assistant's, as in prompt_completion. What comes
of a row are two, one with either answer.
Deviations: TRL takes strings as running text without a template.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, ClassVar

from finebits.data.error import DataError
from finebits.data.forms._turns import answer_of, prompt_of, template_kwargs, turns
from finebits.data.rows import Row

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Preference:
    """A prompt, and which of two answers is the better.

    >>> row = Preference().row({"prompt": "hi", "chosen": "ho", "rejected": "no"}, 1, "rows.jsonl")
    >>> [answer.messages[-1]["content"] for answer in row.answers], row.rejected.liked
    (['ho', 'no'], False)
    """

    order: ClassVar[int] = 22
    keys: ClassVar[tuple[str, ...]] = SIDES

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where = f"{path}:{line}"
        prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
        if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
            prompt, chosen, rejected = _shared(chosen, rejected)
        sides = [answer_of(side, where, key) for key, side in zip(SIDES, (chosen, rejected), strict=True)]
        given = [] if prompt is None else prompt_of(prompt, where)
        if not given:
            given = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))]
        sides = [side[len(given) :] if side[: len(given)] == given else side for side in sides]
        if not given or not all(sides):
            lost = "prompt that both answers begin with" if not given else f'turn in "{SIDES[0 if not sides[0] else 1]}" behind the prompt'
            raise DataError(f'{where}: there is no {lost}: give "prompt", "chosen" and "rejected", each with what it says alone')
        if sides[0] == sides[1]:
            raise DataError(f'{where}: "chosen" and "rejected" are the same, and say nothing of what is liked more: leave the row out')
        kwargs = template_kwargs(record, where)
        liked, other = (turns(line, path, [*given, *side], len(given), kwargs) for side in sides)
        return replace(liked, rejected=replace(other, liked=False))


def _shared(chosen: str, rejected: str) -> tuple[str | None, str, str]:
    """What both begin with, up to the end of a word (None: nothing), and how each goes on."""
    at = len(os.path.commonprefix([chosen, rejected]))
    while at and not chosen[at - 1].isspace():
        at -= 1
    return chosen[:at] or None, chosen[at:], rejected[at:]
