"""Prompts and what follows them, as TRL writes them: `{"prompt": […], "completion": […]}`, turns of one conversation, or two strings.

Of turns, those of the completion are learned and those of the prompt are shown, whoever speaks. Two strings are a user's turn and the
assistant's, so that the chat template says where each ends.
Deviations: TRL takes two strings as running text without a template, which a model that was tuned on turns answers no prompt with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.data.error import DataError, kind
from finebits.data.forms._turns import template_kwargs, turn, turns
from finebits.data.rows import Row


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt, and what is learned after it.

    >>> [m["role"] for m in PromptCompletion().row({"prompt": "hi", "completion": "ho"}, 1, "rows.jsonl").messages]
    ['user', 'assistant']
    """

    order: ClassVar[int] = 30
    keys: ClassVar[tuple[str, ...]] = ("prompt", "completion")

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where = f"{path}:{line}"
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            both = [turn("user", prompt, where, "prompt"), turn("assistant", completion, where, "completion")]
            return turns(line, path, both, kwargs=template_kwargs(record, where))
        if not (isinstance(prompt, list) and isinstance(completion, list) and prompt and completion):
            raise DataError(
                f'{where}: "prompt" and "completion" must be two strings, or two lists of {{"role", "content"}}; got {kind(prompt)} and '
                f"{kind(completion)}"
            )
        return turns(line, path, [*prompt, *completion], len(prompt), template_kwargs(record, where))
