"""Conversations: `{"messages": [{"role", "content"}, …]}` as OpenAI and Hugging Face write them; roles system, user, assistant and tool.

A message may say more than its role and content. `weight` (0 or 1) and `train` say whether an assistant's turn is learned; any other key
that holds something goes to the chat template as it is, and a row whose template does not read it is refused there (finebits.data.turns).
`tools`, `documents` and `chat_template_kwargs` beside `messages` are given to the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.data.forms._turns import messages, template_kwargs
from finebits.data.rows import Row


@dataclass(frozen=True)
class Messages:
    """Turns of a conversation.

    >>> row = Messages().row({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, 1, "rows.jsonl")
    >>> len(row.messages), row.kind
    (2, 'messages')
    """

    order: ClassVar[int] = 10
    keys: ClassVar[tuple[str, ...]] = ("messages",)

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where = f"{path}:{line}"
        turns, untrained = messages(record["messages"], where)
        return Row(line, turns, None, path, untrained, template_kwargs(record, where))
