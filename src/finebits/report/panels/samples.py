"""What the model answered before, after, and as it was exported, with the words that are not the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from finebits.report.folder import Folder
from finebits.report.panels.base import LONGEST, Block, Panel

SAMPLES = 12  # rows shown
AGAINST = {"after": "before", "exported": "after"}


def panel(run: Folder) -> Panel | None:
    if not run.samples:
        return None
    shown = [_shown(s) for s in run.samples[:SAMPLES]]
    lead = f"The first {len(shown)} of {len(run.samples)}. " if len(run.samples) > len(shown) else ""
    lead += "Marked: words that are not in the answer before."
    told = [s for s in run.samples if s.get("exported") is not None]
    if told:
        same = sum(s["exported"] == s.get("after") for s in told)
        lead += f" The exported adapter over its base, read by stock libraries, gives {same} of {len(told)} answers word for word."
    return Panel("samples", "Samples before and after", [Block(samples=shown)], lead)


def _shown(sample: Any) -> dict[str, Any]:
    """The prompt, and every answer in pieces of (class, text)."""
    texts = {k: _cut(sample.get(k)) for k in ("reference", "before", "after", "exported")}
    if texts["exported"] is None:
        del texts["exported"]
    answers = []
    for name, text in texts.items():
        other = texts.get(AGAINST.get(name, ""))
        pieces = [("", "–")] if text is None else [("", text)] if other is None else list(changed(other, text))
        answers.append((name, pieces, text is not None and text == other))
    return {"prompt": _cut(sample.get("prompt")), "answers": answers}


def changed(before: str, after: str) -> Iterator[tuple[str, str]]:
    """`after` in pieces, those that `before` does not have marked "new"; by words.

    >>> list(changed("a red box", "a blue box"))
    [('', 'a '), ('new', 'blue'), ('', ' box')]
    """
    a, b = (_words(text) for text in (before, after))
    for op, _, _, lo, hi in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if hi > lo:
            yield ("" if op == "equal" else "new"), "".join(b[lo:hi])


def _words(text: str) -> Sequence[str]:
    return re.findall(r"\s+|\w+|[^\w\s]", text)


def _cut(answer: Any) -> str | None:
    if answer is None:
        return None
    answer = str(answer)
    return answer if len(answer) <= LONGEST else f"{answer[:LONGEST]} … ({len(answer) - LONGEST:,} more characters)"
