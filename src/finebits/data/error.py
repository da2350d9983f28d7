"""What is wrong with a data set, and how its values are called in a sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finebits.errors import Invalid


class DataError(Invalid):
    """The data set cannot be read. `code` is the exit code: 2 if there is no such file or format, 4 if its content is at fault.

    >>> DataError("a.jsonl:3: not JSON").code, DataError("the data set is not there", code=2).code
    (4, 2)
    """

    def __init__(self, message: str, code: int = 4) -> None:
        super().__init__(message)
        self.code = code


PLAIN = json.JSONEncoder(ensure_ascii=False).encode


def characters(value: Any, at: str) -> None:
    """Raises DataError where a text holds half of a surrogate pair, which no tokenizer takes.

    >>> characters("of any language: 語", "a.jsonl:1")
    >>> characters([object()], "a.jsonl:1")
    Traceback (most recent call last):
        ...
    finebits.data.error.DataError: a.jsonl:1 is nested too deeply, or is not made of JSON's values
    """
    try:
        for part in (*value, *value.values()) if isinstance(value, dict) else (value,):
            (part if isinstance(part, str) else PLAIN(part)).encode()
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}"
        raise DataError(
            f"{at} holds {half}, half of a character that takes two: mend the text (an emoji was cut) or leave the row out"
        ) from None
    except (TypeError, RecursionError):
        raise DataError(f"{at} is nested too deeply, or is not made of JSON's values") from None


def got(record: Mapping[str, Any], key: str) -> str:
    return kind(record[key]) if key in record else f"the keys {names(record)}"


def names(record: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(key)[:40]) for key in list(record)[:12]) or "(none)"


def kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")
