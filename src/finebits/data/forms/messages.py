"""Conversations: `{"messages": [{"role", "content"}, …]}` as OpenAI and Hugging Face write them; roles system, user, assistant and tool.

A message may say more than its role and content. `weight` (0 or 1) and `train` say whether an assistant's turn is learned; any other key
that holds something goes to the chat template as it is, and a row whose template does not read it is refused there (finebits.data.turns).
`tools`, `documents` and `chat_template_kwargs` beside `messages` are given to the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.data.forms._turns import messages
from finebits.data.rows import DataError, Row, characters, kind

FOR_TEMPLATE = {"tools": list, "documents": list, "chat_template_kwargs": dict}  # keys of a row, beside messages, that a template is given


@dataclass(frozen=True)
class Messages:
    """Turns of a conversation.

    >>> row = Messages().row({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, 1, "rows.jsonl")
    >>> len(row.messages), row.kind
    (2, 'messages')
    """

    order: ClassVar[int] = 10
    wanted: ClassVar[str] = 'a key "messages" (a list of {"role", "content"})'
    keys: ClassVar[tuple[str, ...]] = ("messages",)

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where = f"{path}:{line}"
        turns, untrained = messages(record["messages"], where)
        return Row(line, turns, None, path, untrained, _template_kwargs(record, where))


def _template_kwargs(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row gives its template beside messages."""
    kwargs = {}
    for key, type_ in FOR_TEMPLATE.items():
        value = record.get(key)
        if not value:
            continue
        if not isinstance(value, type_):
            raise DataError(f'{where}: "{key}" must be {"a list" if type_ is list else "an object"}; got {kind(value)}')
        characters(value, f'{where}: "{key}"')
        kwargs |= value if type_ is dict else {key: value}
    if reserved := kwargs.keys() & {"conversation", "tokenize", "add_generation_prompt", "chat_template"}:
        raise DataError(f'{where}: "chat_template_kwargs" sets {min(reserved)!r}, which finebits sets itself: take it out')
    return kwargs
