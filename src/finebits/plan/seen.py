"""What was seen of a model's blocks as they ran without values: bytes as functions of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Batch(NamedTuple):
    """b, t (padding included), K, how many padded widths the run has met by then, and whether it is met in the first step alone."""

    rows: int
    tokens: int
    labelled: int
    widths: int = 1
    first: bool = False


class Curve(NamedTuple):
    """Bytes as a function of a batch, seen for rows of a few lengths `tokens`: bytes a token in batches of one row, and of two.

    What is seen is the most of several sums whose terms grow with t or with t². Divided by t, such a thing is convex: between two lengths a
    straight line is never below it. More rows take no more than their number times half of what two rows take.

    >>> curve = Curve(tokens=(10, 20), one=(4.0, 8.0), two=(4.0, 8.0))
    >>> curve(Batch(1, 15, 15)), curve(Batch(2, 15, 15))  # between 4 and 8 bytes a token
    (90, 180)
    """

    tokens: tuple[int, ...]
    one: tuple[float, ...]
    two: tuple[float, ...]

    def __call__(self, batch: Batch) -> int:
        per_token, t = self.one if batch.rows == 1 else self.two, batch.tokens
        if t <= self.tokens[0]:
            return math.ceil(batch.rows * self.tokens[0] * per_token[0])
        high = next((k for k, n in enumerate(self.tokens) if n >= t), len(self.tokens) - 1)
        low = max(high - 1, 0)
        step = max(self.tokens[high] - self.tokens[low], 1)
        slope = (per_token[high] - per_token[low]) / step
        if t > self.tokens[high]:  # longer than all that were seen: what grew goes on
            return math.ceil(batch.rows * t * (per_token[high] + max(slope, 0.0) * (t - self.tokens[high])))
        return math.ceil(batch.rows * t * (per_token[low] + slope * (t - self.tokens[low])))


class Observed(NamedTuple):
    """What was seen of a model's blocks, in bytes, while its adapters had rank `rank` and numbers of `width` bytes were computed."""

    kept: Curve  # by all blocks, for their backward pass
    most: Curve  # by the block that keeps most
    back: Curve  # comes and goes while a block is computed backwards
    again: Curve  # one block that is computed again from its input, and backwards
    left: Curve  # behind by all blocks that were: what a block keeps for itself
    forward: Curve  # comes and goes in a block where nothing is kept
    shared: Curve  # is there for all blocks: masks, tables of positions
    ends: Curve  # kept of the way from the last block to the head
    turn: Curve  # the most that is there on this way and back
    layers: int
    hidden: int  # width of the states between blocks
    adapted: int  # planned matrices that the model calls
    rank: int
    width: int
    virtual: int = 0  # tokens that blocks see of a row beside its own

    def to_json(self) -> dict[str, Any]:
        data = {k: v if isinstance(v, int) else [list(part) for part in v] for k, v in self._asdict().items()}
        return {k: v for k, v in data.items() if k != "virtual" or v}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Observed:
        """The inverse."""
        parts: dict[str, Any] = {k: v if isinstance(v, int) else Curve(*map(tuple, v)) for k, v in data.items()}
        return cls(**parts)
