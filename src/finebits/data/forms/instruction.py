"""Instructions, as Alpaca has them: `{"instruction": "…", "input": "…", "output": "…"}`, and perhaps `system` and `history`; `input` may
be empty or missing.

A user's turn (the instruction and, after an empty line, the input) and the assistant's, behind a system turn where there is one: the chat
template of the model is what frames them. `history` holds what was said before, `[["asked", "answered"], …]`; its answers are learned too.
Deviations: Alpaca's own frame ("Below is an instruction …") is a template of its time, and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.data.error import DataError, kind
from finebits.data.forms._turns import template_kwargs, turn, turns
from finebits.data.rows import Row


@dataclass(frozen=True)
class Instruction:
    """A task and its answer.

    >>> Instruction().row({"instruction": "add", "input": "1, 2", "output": "3"}, 1, "rows.jsonl").messages[0]["content"]
    'add\\n\\n1, 2'
    """

    order: ClassVar[int] = 40
    keys: ClassVar[tuple[str, ...]] = ("instruction", "output")

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where = f"{path}:{line}"
        system = [turn("system", record["system"], where, "system")] if record.get("system") else []
        asked = turn("user", record["instruction"], where, "instruction")
        if record.get("input"):
            asked["content"] += "\n\n" + turn("user", record["input"], where, "input")["content"]
        said = [*system, *_history(record.get("history") or [], where), asked, turn("assistant", record["output"], where, "output")]
        return turns(line, path, said, kwargs=template_kwargs(record, where))


def _history(pairs: Any, where: str) -> list[dict[str, Any]]:
    said = []
    for i, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f'{where}: "history" must be a list of pairs of strings, [["asked", "answered"], …]; pair {i + 1} is {kind(pair)}'
            )
        said += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return said
