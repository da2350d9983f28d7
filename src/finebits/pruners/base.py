"""What a pruner is: a value that says how much every entry of a weight is worth, by itself or by what the layer is given.

Units (a channel of a feed-forward sublayer, a head of keys and values with its queries) are worth the sum over their entries, in all matrices
that they are parts of, or, where a pruner looks `back` alone, in the one that leads back to the states. What is worth least goes.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from jaxtyping import Float
from torch import Generator, Tensor

from finebits.stats.base import Statistic, Stats


class Pruner(Protocol):
    """A frozen dataclass."""

    needs: ClassVar[frozenset[type[Statistic]]]
    back: ClassVar[bool]

    def __call__(self, W: Float[Tensor, "m n"], stats: Stats, gen: Generator) -> Float[Tensor, "m n"]:
        """What every entry is worth, in float32 and at least 0."""
        ...
