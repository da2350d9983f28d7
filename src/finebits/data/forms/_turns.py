"""Turns of a conversation: what one may hold, which are learned, and in which order they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finebits.data.error import DataError, characters, got, kind
from finebits.data.rows import Row

ROLES = ("system", "user", "assistant", "tool")
FOR_TEMPLATE = {"tools": list, "documents": list, "chat_template_kwargs": dict}  # keys of a row, beside messages, that a template is given


def disorder(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the order of roles, as the end of a sentence that begins "these rows …"; None if nothing is.

    Right is: perhaps one system turn, then user and assistant in turn, the assistant last; an assistant's turn may be followed by the
    answers of tools and then by the assistant again.
    """
    roles = [message["role"] for message in messages]
    for role in roles:
        if role not in ROLES:
            return f"hold a turn of the role {role!r} (known: {', '.join(ROLES)})"
    if "system" in roles[1:]:
        return "hold a system turn that is not the first turn"
    turns = roles[roles[:1] == ["system"] :]
    if "assistant" not in turns:
        return "hold no assistant turn"
    if turns[0] != "user":
        return f"begin with {'an' if turns[0] == 'assistant' else 'a'} {turns[0]} turn"
    for one, next_ in zip(turns, turns[1:], strict=False):
        if one == next_ != "tool":
            return f"hold two {one} turns in a row"
        if next_ == "tool" and one == "user":
            return "hold a tool turn that follows no assistant turn"
    return None if turns[-1] == "assistant" else f"end with a {turns[-1]} turn"


def messages(value: Any, where: str) -> tuple[tuple[dict[str, Any], ...], frozenset[int]]:
    """The turns, and the numbers (from 0) of those that say that they are not learned."""
    if not isinstance(value, list) or not value:
        came = "an empty list" if value == [] else kind(value)
        raise DataError(f'{where}: "messages" must be a list of {{"role", "content"}}; got {came}')
    turns, untrained = [], set()
    for i, message in enumerate(value):
        at = f"{where}: turn {i + 1}"
        if not isinstance(message, Mapping):
            raise DataError(f'{at} must be an object with "role" and "content"; got {kind(message)}')
        if not isinstance(message.get("role"), str):
            raise DataError(f'{at} needs "role" as a string; got {got(message, "role")}')
        if not _learned(message, at):
            untrained.add(i)
        turn = {"role": message["role"], "content": _content(message, at)}
        turn |= {k: v for k, v in message.items() if k not in (*turn, "weight", "train") and v not in (None, "", [], {})}
        characters(turn, at)
        turns.append(turn)
    return tuple(turns), frozenset(untrained)


def _learned(message: Mapping[str, Any], at: str) -> bool:
    """Is the turn learned, as far as it says so itself?"""
    flags = []
    for key in ("weight", "train"):
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1) or (key == "train" and not isinstance(value, bool)):
            wanted = "0 or 1" if key == "weight" else "true or false"
            raise DataError(f'{at} has a "{key}" of {str(value)[:40]!r}: it can be {wanted}')
        if value and message["role"] != "assistant":
            raise DataError(f'{at} ({message["role"]}) asks by its "{key}" to be learned, and only assistant turns are: take the key out')
        flags.append(bool(value))
    if len(set(flags)) > 1:
        raise DataError(f'{at} says by "weight" that it is {"" if flags[0] else "not "}learned, and by "train" the opposite: take one out')
    return not flags or flags[0]


def _content(message: Mapping[str, Any], at: str) -> str:
    """The content as one string: parts of text are put one after the other; a turn that calls tools may have none."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text"
            if not isinstance(part, str) and not is_text:
                what = f"a part of the type {str(part.get('type'))[:40]!r}" if isinstance(part, Mapping) else kind(part)
                raise DataError(f'{at} has {what} in its "content": finebits learns text, so leave such rows out')
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise DataError(f'{at} needs "content" as a string; got {got(message, "content")}')
    return content


def turn(role: str, text: Any, where: str, key: str) -> dict[str, Any]:
    """A turn out of a string that stands under `key`."""
    if not isinstance(text, str):
        raise DataError(f'{where}: "{key}" must be a string; got {kind(text)}')
    return {"role": role, "content": text}


def turns(line: int, path: str, raw: Sequence[Any], shown: int = 0, kwargs: Mapping[str, Any] | None = None) -> Row:
    """A row of these turns, the first of which are shown and not learned; `kwargs` are for the template."""
    parsed, untrained = messages(list(raw), f"{path}:{line}")
    return Row(line, parsed, None, path, untrained | {i for i in range(shown) if parsed[i]["role"] == "assistant"}, kwargs or {})


def prompt_of(value: Any, where: str) -> list[Any]:
    """A prompt as turns: a string is a user's."""
    return value if isinstance(value, list) else [turn("user", value, where, "prompt")]


def answer_of(value: Any, where: str, key: str) -> list[Any]:
    """What follows a prompt as turns: a string is the assistant's. Raises DataError where it is neither, or no turn."""
    if isinstance(value, str):
        return [turn("assistant", value, where, key)]
    if not isinstance(value, list) or not value:
        came = "an empty list" if value == [] else kind(value)
        raise DataError(f'{where}: "{key}" must be a string or a list of {{"role", "content"}}; got {came}')
    return value


def template_kwargs(record: Mapping[str, Any], where: str) -> dict[str, Any]:
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
