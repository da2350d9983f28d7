"""Classification of pictures: a picture, and which of a few things it shows.

A picture is as many tokens as the model cuts it into, whatever the row; states and outputs are those of any classifier (W h + b behind what the
model itself picks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finebits.data import labelled
from finebits.data.arrays import Tokens
from finebits.data.check import Check
from finebits.data.limits import UNKNOWN
from finebits.data.pictures import Pictures, stacked
from finebits.data.rows import DataError, Row, Rows, gathered
from finebits.data.tokens import Encoded
from finebits.errors import WrongUse
from finebits.tasks import _categories as categories
from finebits.tasks._head import Head
from finebits.tasks.base import Ask, Batch, Numbers, Prompt


@dataclass(frozen=True)
class ImageClassification:
    """A row is one of `labels`; its picture of `shape` (channels, height, width) is `patches` tokens to the model.

    >>> ImageClassification(("shirt", "bag"), (1, 28, 28), 50).tokens(784)
    50
    """

    labels: tuple[str, ...] = ("0", "1")
    shape: tuple[int, int, int] = (3, 224, 224)
    patches: int = 197
    auto: ClassVar[str] = "AutoModelForImageClassification"
    ending: ClassVar[str] = "ForImageClassification"
    peft: ClassVar[str | None] = None
    pipeline: ClassVar[str] = "image-classification"
    unit: ClassVar[str] = "labels"
    measures: ClassVar[tuple[str, ...]] = ("accuracy",)
    places = targets = categories.same
    inside = outside = categories.every
    learned, size, answers = categories.rows_of, categories.rows_in, categories.answers
    loss, drawn, score = categories.loss, categories.drawn, staticmethod(categories.score)

    @classmethod
    def of(cls, config: Any) -> ImageClassification:
        size, patch = (_pair(getattr(config, k, None)) for k in ("image_size", "patch_size"))
        if size is None or patch is None:
            kind = getattr(config, "model_type", type(config).__name__)
            raise WrongUse(
                f"the config of {kind} has no image_size and patch_size: pictures are cut into patches of one size here, as a ViT does"
            )
        return cls(categories.names_of(config), (config.num_channels, *size), (size[0] // patch[0]) * (size[1] // patch[1]) + 1)

    def processor(self, folder: Path, tokenizer: Callable[[Path], Any]) -> Any:
        return Pictures.of(folder, self.shape)

    def check(self, rows: Rows, processor: Any, max_length: int, assistant_only_loss: bool, limits: Ask) -> Check:
        seen = [None if row.image is None else Encoded([0] * self.patches, [], (), row.line, row.path) for row in rows]
        shown = (row.image if isinstance(row.image, str) else f"a picture in line {row.line}" for row in rows)
        read = lambda row, e: _pixels(row, processor, rows.path)  # noqa: E731
        return labelled.looked_at(rows, self.labels, seen, shown, read, self.patches, UNKNOWN)

    def examples(self, rows: Any, processor: Any, max_length: int, assistant_only_loss: bool) -> Tokens:
        if isinstance(rows, Tokens):
            return rows
        rows = gathered(rows)
        kinds = labelled.classes(rows, self.labels)
        examples = (labelled.example(row, _pixels(row, processor, rows.path), k, 0, rows.path) for row, k in zip(rows, kinds, strict=True))
        return Tokens.of(examples, self.patches, False)

    def require(self, tokens: Tokens, processor: Any, limits: Ask) -> None:
        pass

    def longest(self, max_length: int) -> int:
        return self.patches

    def input_bytes(self) -> int:
        return 4 * math.prod(self.shape)

    def tokens(self, numbers: int) -> int:
        return self.patches

    def batch(self, rows: Sequence[Numbers], processor: Any, multiple: int = 1) -> dict[str, Tensor]:
        values = processor.values(stacked(rows, self.shape))
        return {"pixel_values": values, "labels": torch.tensor([r["input_ids"][-1] for r in rows])}

    def inputs(self, batch: Batch) -> int:
        return len(batch["labels"]) * self.patches

    def blank(self, rows: int, tokens: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.empty(rows, *self.shape, device="meta")}

    def head(self, model: Any) -> Head:
        return categories.classifier(model, len(self.labels))

    def states(self, model: Any, batch: Batch) -> Tensor:
        return categories.before(model, self.head(model), {"pixel_values": batch["pixel_values"]})

    def outputs(self) -> int:
        return len(self.labels)

    def prompts(self, rows: Rows, processor: Any, count: int, longest: int | None = None) -> list[Prompt]:
        """Pictures are all of one size."""
        pixels = [_pixels(row, processor, rows.path) for row in rows[:count]]
        return [Prompt(sketched(g, self.shape), str(row.label), [*g, 0]) for row, g in zip(rows, pixels, strict=False)]


def _pair(value: Any) -> tuple[int, int] | None:
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) and len(value) == 2 else None


def _pixels(row: Row, processor: Pictures, path: str) -> list[int]:
    where = f"{row.path or path}:{row.line}"
    if row.image is None:
        raise DataError(f'{where}: a row to classify needs "image"')
    return processor.read(row, where).flatten().tolist()


def sketched(pixels: Sequence[int], shape: tuple[int, int, int], width: int = 28) -> str:
    """A picture in characters, dark to light, for a terminal and a page of text.

    >>> print(sketched([0, 128, 255, 0], (1, 2, 2), width=4) + "|")
      ++
    @@  |
    """
    c, h, w = shape
    grey = torch.tensor(list(pixels), dtype=torch.float32).view(1, c, h, w).mean(1, keepdim=True)
    small = torch.nn.functional.interpolate(grey, (max(width * h // (2 * w), 1), width), mode="area")[0, 0]
    shades = " .:-=+*#%@"
    return "\n".join("".join(shades[min(int(v) * len(shades) // 256, len(shades) - 1)] for v in line) for line in small)
