"""Classification of sequences: a text, and which of a few things it is.

States are what the model's own forward hands on to where its classifier's outputs go, so that what it pools (the first token, the last one) is
not known by name; outputs are W h + b. A model whose head is another, or that was made for numbers or several labels a row, is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finebits.data import labelled
from finebits.data.arrays import Tokens
from finebits.data.check import Check
from finebits.data.rows import DataError, Row, Rows, gathered
from finebits.data.tokens import Encoded, pad_of
from finebits.tasks import _categories as categories
from finebits.tasks._head import Head
from finebits.tasks.base import Ask, Batch, Numbers, Prompt

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Classification:
    """A row is one of `labels`, in the order of the model's outputs.

    >>> Classification(("ham", "spam")).outputs()
    2
    """

    labels: tuple[str, ...] = ("0", "1")
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    ending: ClassVar[str] = "ForSequenceClassification"
    peft: ClassVar[str | None] = None  # PEFT's own kind would lay a second, trained head over the model's
    pipeline: ClassVar[str] = "text-classification"
    unit: ClassVar[str] = "labels"
    measures: ClassVar[tuple[str, ...]] = ("accuracy",)
    places = targets = categories.same
    outside = categories.every
    learned, size, answers = categories.rows_of, categories.rows_in, categories.answers
    loss, drawn, score = categories.loss, categories.drawn, staticmethod(categories.score)

    @classmethod
    def of(cls, config: Any) -> Classification:
        return cls(categories.names_of(config))

    def processor(self, folder: Path, tokenizer: Callable[[Path], Any]) -> Any:
        return tokenizer(folder)

    def check(self, rows: Rows, processor: Any, max_length: int, assistant_only_loss: bool, limits: Ask) -> Check:
        seen = [None if row.text is None else _encoded(row, processor) for row in rows]
        shown = (row.text or "" for row in rows)
        return labelled.looked_at(
            rows, self.labels, seen, shown, lambda row, e: _cut(row, e, processor, max_length), max_length, limits(), processor
        )

    def examples(self, rows: Any, processor: Any, max_length: int, assistant_only_loss: bool) -> Tokens:
        if isinstance(rows, Tokens):
            return labelled.within(rows, max_length)
        rows, examples = gathered(rows), []
        for row, label in zip(rows, labelled.classes(rows, self.labels), strict=True):
            if row.text is None:
                raise DataError(f'{row.path or rows.path}:{row.line}: a row to classify needs "text"; this one holds {rows.format}')
            encoded = _encoded(row, processor)
            examples.append(labelled.example(row, _cut(row, encoded, processor, max_length), label, len(encoded.ids), rows.path))
        return Tokens.of(examples, max_length, False)

    def require(self, tokens: Tokens, processor: Any, limits: Ask) -> None:
        limits().require([replace(e, input_ids=e.input_ids[:-1]) for e in tokens], processor)

    def longest(self, max_length: int) -> int:
        return max_length

    def input_bytes(self) -> int:
        return 0

    def tokens(self, numbers: int) -> int:
        return numbers - 1  # the last one is the class

    def batch(self, rows: Sequence[Numbers], processor: Any, multiple: int = 1) -> dict[str, Tensor]:
        texts = [list(r["input_ids"])[:-1] for r in rows]
        width = -(-max(map(len, texts)) // multiple) * multiple
        filled = lambda values, fill: [*values, *[fill] * (width - len(values))]  # noqa: E731
        return {
            "input_ids": torch.tensor([filled(ids, pad_of(processor)) for ids in texts]),
            "attention_mask": torch.tensor([filled([1] * len(ids), 0) for ids in texts]),
            "labels": torch.tensor([r["input_ids"][-1] for r in rows]),
        }

    def inputs(self, batch: Batch) -> int:
        return int(batch["attention_mask"].sum())

    def blank(self, rows: int, tokens: int) -> dict[str, Tensor]:
        return {k: torch.empty(rows, tokens, dtype=torch.int64, device="meta") for k in ("input_ids", "attention_mask")}

    def head(self, model: Any) -> Head:
        return categories.classifier(model, len(self.labels))

    def states(self, model: Any, batch: Batch) -> Tensor:
        inputs: dict[str, Any] = {k: batch[k] for k in INPUTS if k in batch}
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs |= {"use_cache": False}
        return categories.before(model, self.head(model), inputs)

    def inside(self, batch: Batch) -> Tensor | None:
        return batch["attention_mask"].bool()

    def outputs(self) -> int:
        return len(self.labels)

    def prompts(self, rows: Rows, processor: Any, count: int, longest: int | None = None) -> list[Prompt]:
        room = min(processor.model_max_length, LONGEST if longest is None else longest)
        numbers = lambda row: [*_cut(row, _encoded(row, processor), processor, room), 0]  # noqa: E731
        return [Prompt(row.text or "", str(row.label), numbers(row)) for row in rows[:count]]


LONGEST = 512  # tokens of a sample


def _encoded(row: Row, processor: Any) -> Encoded:
    """A row, uncut."""
    ids = list(processor(row.text or "", verbose=False)["input_ids"])
    return Encoded(ids, [False] * len(ids), (), row.line, row.path)


def _cut(row: Row, encoded: Encoded, processor: Any, length: int) -> list[int]:
    """A row in so many tokens at most, its last one the token that ends a text."""
    if len(encoded.ids) <= length:
        return encoded.ids
    return list(processor(row.text or "", truncation=True, max_length=length)["input_ids"])
