"""Conversations as ShareGPT has them: `{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}`.

Perhaps `system` (a string) and `tools` (a list, or one as JSON in a string) beside them. Who speaks is named in several ways (`SPEAKERS`);
turns with `role`
and `content` under this key are read too. A turn of `function_call` holds the call as JSON, `{"name", "arguments"}`, one or a list of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.data.error import DataError, got, kind
from finebits.data.forms._turns import template_kwargs, turn, turns
from finebits.data.rows import Row

SPEAKERS = {
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"),
    "tool": ("observation", "tool", "function_response"),
    "system": ("system",),
}
ROLES = {speaker: role for role, speakers in SPEAKERS.items() for speaker in speakers}


@dataclass(frozen=True)
class ShareGPT:
    """Turns of a conversation.

    >>> row = ShareGPT().row({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, 1, "rows.jsonl")
    >>> [m["role"] for m in row.messages]
    ['user', 'assistant']
    """

    order: ClassVar[int] = 15
    keys: ClassVar[tuple[str, ...]] = ("conversations",)

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where, said = f"{path}:{line}", record["conversations"]
        if not isinstance(said, list) or not said:
            came = "an empty list" if said == [] else kind(said)
            raise DataError(f'{where}: "conversations" must be a list of {{"from", "value"}}; got {came}')
        system = [turn("system", record["system"], where, "system")] if record.get("system") else []
        tools = {"tools": _json(record["tools"], f'{where}: "tools"')} if isinstance(record.get("tools"), str) and record["tools"] else {}
        told = [_turn(one, f"{where}: turn {i}") for i, one in enumerate(said, 1)]
        return turns(line, path, [*system, *told], kwargs=template_kwargs({**record, **tools}, where))


def _turn(said: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(said, Mapping):
        raise DataError(f'{at} must be an object with "from" and "value"; got {kind(said)}')
    if "from" not in said and "role" in said:
        return said
    speaker = said.get("from")
    if not isinstance(speaker, str) or not isinstance(said.get("value"), str):
        lost = "from" if not isinstance(speaker, str) else "value"
        raise DataError(f'{at} needs "{lost}" as a string; got {got(said, lost)}')
    role = ROLES.get(speaker.lower())
    if role is None:
        raise DataError(f"{at} is said by {speaker[:40]!r}, and known are {', '.join(ROLES)}: rename it")
    more = {k: v for k, v in said.items() if k not in ("from", "value")}
    if speaker.lower() == "function_call":
        calls = _json(said["value"], f"{at} (function_call)")
        called = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        return {"role": role, "content": "", "tool_calls": called, **more}
    return {"role": role, "content": said["value"], **more}


def _json(text: str, at: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{at} must be JSON; got {text[:40]!r}") from None
    if not isinstance(value, list | dict):
        raise DataError(f"{at} must be a list or an object in JSON; got {kind(value)}")
    return value
