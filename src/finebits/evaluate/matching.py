"""Answers against references: by what they say once spelling is out of the way, by a number, by a pattern, or by a function of the user's.

A match gives 0 or 1 for a row, a judge a number from 0 to 1. The number of an answer is the last that it holds, as is the custom for GSM8K.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finebits.errors import Invalid

Match = Callable[[str, str], bool]  # (answer, reference) -> does it say the same?
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def plain(text: str) -> str:
    """Without case, white space at ends and in rows, and a full stop.

    >>> plain(" The  Answer.\\n")
    'the answer'
    """
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def number(text: str) -> float | None:
    """The last number of a text.

    >>> number("3 boxes of 12 are 1,036.50 in all."), number("none")
    (1036.5, None)
    """
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def exact(answer: str, reference: str) -> bool:
    """
    >>> exact("Spam.", "spam"), exact("It is spam", "spam")
    (True, False)
    """
    return plain(answer) == plain(reference)


def contains(answer: str, reference: str) -> bool:
    """The reference is part of the answer, from word to word.

    >>> contains("It is spam!", "spam"), contains("It is spammy", "spam")
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(plain(reference))}(?!\w)", plain(answer)) is not None


def same_number(answer: str, reference: str) -> bool:
    """
    >>> same_number("so it is 42.0", "... #### 42"), same_number("so it is", "42")
    (True, False)
    """
    a, b = number(answer), number(reference)
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def by(text: str) -> Match:
    """`exact`, `contains`, `number`, or `regex:PATTERN`: what the pattern's first group (or the whole of it) takes last out of the answer must
    say what it takes out of the reference, or the reference where it takes nothing there.

    >>> by("regex:answer is (\\\\w+)")("the answer is B.", "b")
    True
    >>> by("fuzzy")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: answers are matched by exact, contains, number or regex:PATTERN; got 'fuzzy'
    """
    plainly: dict[str, Match] = {"exact": exact, "contains": contains, "number": same_number}
    if text in plainly:
        return plainly[text]
    kind, _, pattern = text.partition(":")
    if kind != "regex" or not pattern:
        raise Invalid(f"answers are matched by exact, contains, number or regex:PATTERN; got {text!r}")
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise Invalid(f"{pattern!r} is no regular expression ({e})") from None

    def taken(said: str) -> str | None:
        found = [m.group(1 if compiled.groups else 0) for m in compiled.finditer(said)]
        return found[-1] if found else None

    def matches(answer: str, reference: str) -> bool:
        own, other = taken(answer), taken(reference)
        return own is not None and exact(own, reference if other is None else other)

    return matches


Judge = Callable[[Sequence[Mapping[str, Any]], Sequence[str]], Sequence[float]]


def judge(named: str) -> Judge:
    """The user's function `module:function` or `file.py:function`, imported because it was asked for: it gets rows ({"prompt", "reference"}) and
    answers, and gives a number from 0 to 1 for each. Raises Invalid where there is none, and where it gives anything else."""
    module, _, name = named.rpartition(":")
    if not module or not name.isidentifier():
        raise Invalid(f"a judge is module:function or file.py:function, and {named!r} came")
    found = getattr(_module(module), name, None)
    if not callable(found):
        raise Invalid(f"{module} has no function {name}, which --judge names")

    def judged(rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[float]:
        given: Any = found(list(rows), list(answers))
        try:
            values = [float(v) for v in given]
        except (TypeError, ValueError):
            raise Invalid(f"{named} must give a number for every answer, and gave {type(given).__name__}") from None
        if len(values) != len(answers) or not all(0 <= v <= 1 for v in values):
            odd = next((v for v in values if not 0 <= v <= 1), None)
            what = f"{len(values)} numbers for {len(answers)} answers" if odd is None else f"{odd:g}, which is not from 0 to 1"
            raise Invalid(f"{named} must give a number from 0 to 1 for every answer, and gave {what}")
        return values

    return judged


def _module(named: str) -> Any:
    if named.endswith(".py"):
        path = Path(named)
        spec = importlib.util.spec_from_file_location(f"finebits_judge_{path.stem}", path) if path.is_file() else None
        if spec is None or spec.loader is None:
            raise Invalid(f"there is no file {named}, which --judge names")
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made
    here = str(Path.cwd())
    sys.path.insert(0, here)  # for this import alone: the user named it
    try:
        return importlib.import_module(named)
    except ModuleNotFoundError as e:
        if e.name != named.partition(".")[0] and e.name != named:
            raise
        raise Invalid(f"there is no module {named}, which --judge names, in {here} or where Python looks") from None
    finally:
        sys.path.remove(here)
