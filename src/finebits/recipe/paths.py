"""Paths as a recipe writes them."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from finebits.errors import Invalid

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def _path(text: str) -> str:
    """The path with ~ and the variables of the environment written out; one that is there as it is written is left."""
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


Written = Annotated[str, AfterValidator(_path)]  # of a file or a folder
