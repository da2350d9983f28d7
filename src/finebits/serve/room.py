"""How many pages of a server's pool adapters and tokens take, before there is a server: the arithmetic of serve.engine over shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from finebits.serve.pages import paging, spans


class Room(NamedTuple):
    """Bytes of a page, and the pages that adapters and keys and values take."""

    page: int
    adapters: int
    cache: int


def room(
    layers: Sequence[tuple[int, int]],
    longest: int,
    adapted: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    adapters: int,
    tokens: int,
    itemsize: int,
) -> Room:
    """Of so many `adapters` at once, each over those of the matrices (m, n) `adapted` that have a rank, and of `tokens` in whole pages of every
    layer, whose keys are (heads, width); `longest` is the longest side of a linear layer, `itemsize` the bytes of a number in the pool.

    >>> room([(3, 64)] * 30, 1536, {"q": (576, 576)}, {"q": 16}, adapters=10, tokens=1000, itemsize=4)
    Room(page=49152, adapters=20, cache=960)
    """
    held, elements = paging(layers, longest)
    one = spans([side for name, (m, n) in adapted.items() if name in ranks for side in ((ranks[name], n), (ranks[name], m))], elements)[1]
    return Room(elements * itemsize, adapters * one, -(-tokens // held) * len(layers))
