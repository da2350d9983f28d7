"""What values of a recipe are looked at for before their types, or beside them."""

from __future__ import annotations

import os
import re
from typing import Any

from finebits import sizes
from finebits.errors import Invalid
from finebits.optim import base as optimizers
from finebits.plan import budget as budgets

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def size(text: str | int | None) -> str | int | None:
    """A size in bytes, as it was written.

    >>> size("8GiB")
    '8GiB'
    """
    if text is not None:
        sizes.parse(text)
    return text


def budget(stated: Any) -> Any:
    """Before types are looked at, so that a number without a unit, whole or not, is asked what it means.

    >>> budget("3.1 bits")
    '3.1 bits'
    """
    budgets.read(stated)
    return stated


def share(text: str) -> str:
    """A share of a size, as it was written.

    >>> share("5%")
    '5%'
    """
    sizes.share(text, 1 << 62)
    return text


def path(text: str) -> str:
    """The path with ~ and the variables of the environment written out; one that is there as it is written is left.

    >>> path("runs/a")
    'runs/a'
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Invalid("the path holds a character that is none: write it in UTF-8") from None
    if "\0" in text:
        raise Invalid("the path holds the character NUL, which no path does")
    if os.path.exists(text):
        return text
    unset = [name or braced for name, braced in VARIABLE.findall(text) if (name or braced) not in os.environ]
    if unset:
        raise Invalid(f"the environment has no variable {unset[0]}: set it, or write the path out")
    path = os.path.expanduser(os.path.expandvars(text))
    if not path:
        raise Invalid(f"{text} is empty: write the path out")
    return path


def init(value: Any) -> Any:
    """PEFT's init_lora_weights: true is a start at zero; false has no counterpart.

    >>> init(True), init("pissa")
    ('zeros', 'pissa')
    """
    if value is False:
        raise Invalid("init wants the name of a method, and false came: write zeros for a start that changes nothing")
    return "zeros" if value is True else value


def requantize(value: Any) -> Any:
    """A format alone, with the other keys as they are by default.

    >>> requantize("int4-b32")
    {'format': 'int4-b32'}
    """
    return {"format": value} if isinstance(value, str) else value


def optimizer(entry: Any) -> Any:
    """transformers' name of an optimizer that is named alone and that it has.

    >>> optimizer("adamw")
    'adamw_torch'
    """
    return (optimizers.named(entry).hf or entry) if isinstance(entry, str) else entry


def adaptive(entry: Any) -> bool:
    """Is this optimizer one of Adam's kind, with its β₁, β₂ and ε? What is wrong with the entry is said elsewhere.

    >>> adaptive("adamw_torch"), adaptive("sgd"), adaptive({"paper": "lion"})
    (True, False, False)
    """
    try:
        return optimizers.named(entry if isinstance(entry, str) else str(entry.get("paper"))).adaptive
    except ValueError:
        return True
