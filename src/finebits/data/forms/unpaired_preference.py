"""Answers that are wanted or not, as TRL writes them for KTO: `{"prompt": …, "completion": …, "label": true}`, strings or turns of a
conversation.

What comes of a row are turns under TRL's names, as in preference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.data.error import DataError, kind
from finebits.data.forms._turns import answer_of, messages, prompt_of, template_kwargs
from finebits.data.rows import Row


@dataclass(frozen=True)
class UnpairedPreference:
    """A prompt, an answer, and whether it is wanted.

    >>> row = UnpairedPreference().row({"prompt": "hi", "completion": "ho", "label": True}, 1, "rows.jsonl")
    >>> row.kind, row.judged["label"]
    ('unpaired_preference', True)
    """

    order: ClassVar[int] = 25
    wanted: ClassVar[str] = 'keys "prompt", "completion" and "label" (true: wanted, false: not)'
    keys: ClassVar[tuple[str, ...]] = ("label", "prompt", "completion")

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        where, label = f"{path}:{line}", record["label"]
        if not isinstance(label, bool):
            fix = "if it is no judgement of the answer, ask for the format prompt_completion"
            raise DataError(f'{where}: "label" must be true or false, whether the answer is wanted; got {kind(label)}: {fix}')
        prompt = record["prompt"]
        sides = {"prompt": prompt_of(prompt, where), "completion": answer_of(record["completion"], where, "completion")}
        said = {key: messages(value, f'{where}: "{key}"')[0] for key, value in sides.items()}
        return Row(line, path=path, judged=said | {"label": label}, template_kwargs=template_kwargs(record, where))
