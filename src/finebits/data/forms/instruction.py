"""Instructions, as Alpaca has them: `{"instruction": "…", "input": "…", "output": "…"}`, and perhaps `system`; `input` may be empty or missing.

A user's turn (the instruction and, after an empty line, the input) and the assistant's, behind a system turn where there is one: the chat
template of the model is what frames them.
Deviations: Alpaca's own frame ("Below is an instruction …") is a template of its time, and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.data.forms._turns import turn, turns
from finebits.data.rows import Row


@dataclass(frozen=True)
class Instruction:
    """A task and its answer.

    >>> Instruction().row({"instruction": "add", "input": "1, 2", "output": "3"}, 1, "rows.jsonl").messages[0]["content"]
    'add\\n\\n1, 2'
    """

    order: ClassVar[int] = 40
    wanted: ClassVar[str] = 'keys "instruction" and "output" (strings)'
    keys: ClassVar[tuple[str, ...]] = ("instruction", "output")

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where = f"{path}:{line}"
        system = [turn("system", record["system"], where, "system")] if record.get("system") else []
        asked = turn("user", record["instruction"], where, "instruction")
        if record.get("input"):
            asked["content"] += "\n\n" + turn("user", record["input"], where, "input")["content"]
        return turns(line, path, [*system, asked, turn("assistant", record["output"], where, "output")])
