"""What a kernel sees of adapters that lie in a pool of pages, and of the rows that are theirs.

A factor lies in pieces: some of its vectors one after another, in as many pages as it takes, anywhere in the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Laid:
    """The factors of one matrix in the pool: pieces (k, n) of A and (k, m) of Bᵀ, each over rows that lie together.

    A body may keep what every call would find out again (`__dict__`): pieces stay where they are.
    """

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    s: float

    @functools.cached_property
    def rank(self) -> int:
        return sum(len(a) for a in self.A)


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter in the pool: its pages, and its factors by module. A body may keep something here, too."""

    pages: list[int]
    at: Mapping[str, Laid]


class Group(NamedTuple):
    """Rows start:stop are of this adapter; of none where it is None."""

    start: int
    stop: int
    adapter: Resident | None


class Groups(list[Group]):
    """Those of a step, which goes through many layers: a body may keep what each would find out again (`__dict__`)."""
