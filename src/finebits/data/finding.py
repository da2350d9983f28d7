"""What the gate finds wrong with rows, and how it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """What is wrong with the rows at `lines`. `level` is fail, warn or info; only fail closes the gate. `message` begins with a count.

    `kind` is one of roles, template, no_trained_token, end_of_turn, truncated_away, no_embedding, positions, nothing, label (fail), truncated,
    double_bos, empty_answer, special_text, generation_prompt, never_stops, far_positions, held_out_overlap (warn), pad_is_eos, pad_token,
    classes (info).
    `lines` are numbers, or "file:line" where the rows are of several files.

    >>> Finding("double_bos", "warn", (3, 7), "2 rows with two BOS tokens").to_json()["lines"]
    [3, 7]
    """

    kind: str
    level: str
    lines: tuple[int | str, ...]
    message: str
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "level": self.level, "lines": [*self.lines], "message": self.message, "fix": self.fix}


def rows_(lines: Sequence[int | str]) -> str:
    return "1 row" if len(lines) == 1 else f"{len(lines):,} rows"


def agree(lines: Sequence[int | str], phrase: str) -> str:
    """The phrase for one row or several: its first word is a verb.

    >>> agree([7], "hold an empty answer"), agree([7, 9], "hold an empty answer")
    ('holds an empty answer', 'hold an empty answer')
    """
    verb, _, rest = phrase.partition(" ")
    return f"{verb}s {rest}".rstrip() if len(lines) == 1 else phrase


def lines_(lines: Sequence[int | str], shown: int = 5) -> str:
    more = f" … ({len(lines) - shown:,} more)" if len(lines) > shown else ""
    return f"{'line' if len(lines) == 1 else 'lines'} {', '.join(map(str, lines[:shown]))}{more}"
