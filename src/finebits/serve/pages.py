"""One pool of pages for the keys and values of requests and the factors of adapters of every rank.

S-LoRA: Serving Thousands of Concurrent LoRA Adapters.  Sheng et al., MLSys 2024.  arXiv:2311.03285v3, section 5.1 (unified paging).

A page is a fixed number of elements. A token block of a request takes one page a layer; the vectors of an adapter (rows of A, columns of B) lie
one after another in its pages, none across an edge, so that every product reads whole rows in place.
Deviations: a page is not one vector of the hidden size, which grouped heads and matrices of other widths would not fill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finebits.errors import Failed, Invalid


class Pool:
    """`count` pages of `elements` numbers, each free or of one owner. Not safe between threads: the engine locks.

    >>> pool = Pool(4, 8)
    >>> mine = pool.take(3, "a")
    >>> pool.free, pool.held()
    (1, {'a': 3})
    >>> pool.give(mine)
    >>> pool.free
    4
    """

    def __init__(self, count: int, elements: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        if count < 1 or elements < 1:
            raise Invalid(f"a pool holds at least one page of one element, not {count} of {elements}: give it a larger budget")
        self.pages = torch.zeros(count, elements, dtype=dtype, device=device)  # finite from the first: masked places are read too
        self.owners: list[Hashable | None] = [None] * count
        self._free = list(range(count - 1, -1, -1))

    @property
    def count(self) -> int:
        return len(self.owners)

    @property
    def elements(self) -> int:
        return self.pages.shape[1]

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        return self.elements * self.pages.itemsize

    def take(self, n: int, owner: Hashable) -> list[int]:
        """n pages, which may lie anywhere. Raises Failed where there are not so many: whoever takes has made room."""
        if owner is None or n > self.free:
            raise Failed(f"{owner} takes {n} pages and {self.free} are free")
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self.owners[page] = owner
        return taken

    def give(self, pages: Iterable[int]) -> None:
        """Back they go. Raises Failed where one is free already."""
        for page in pages:
            if self.owners[page] is None:
                raise Failed(f"page {page} is given back twice")
            self.owners[page] = None
            self._free.append(page)

    def pass_on(self, pages: Iterable[int], owner: Hashable) -> None:
        """They are another's from now on."""
        for page in pages:
            if self.owners[page] is None:
                raise Failed(f"page {page} is nobody's to pass on")
            self.owners[page] = owner

    def scrub(self, pages: Sequence[int]) -> None:
        """Zeros over what may hold NaN, which whoever has the pages next would read behind its mask."""
        self.pages[torch.tensor(pages, dtype=torch.long, device=self.pages.device)] = 0

    def held(self) -> dict[Hashable, int]:
        """Pages by owner."""
        return dict(Counter(owner for owner in self.owners if owner is not None))


class Span(NamedTuple):
    """`rows` vectors of one length that lie together: from `offset` of the `page`-th page of their owner."""

    page: int
    offset: int
    rows: int


def spans(vectors: Sequence[tuple[int, int]], elements: int) -> tuple[list[list[Span]], int]:
    """(where each of these bundles of (rows, length) lies, how many pages that takes): one after another, no vector across the end of a page.

    >>> spans([(3, 4), (1, 2)], 8)  # two of length 4 in the first page, one and that of length 2 in the second
    ([[Span(page=0, offset=0, rows=2), Span(page=1, offset=0, rows=1)], [Span(page=1, offset=4, rows=1)]], 2)
    """
    page, at, found = 0, 0, []
    for rows, length in vectors:
        if length > elements:
            raise Invalid(f"a vector of {length} numbers is longer than a page of {elements}")
        bundle: list[Span] = []
        while rows:
            fits = min(rows, (elements - at) // length)
            if fits:
                bundle.append(Span(page, at, fits))
                rows, at = rows - fits, at + fits * length
            else:
                page, at = page + 1, 0
        found.append(bundle)
    return found, page + (at > 0)


def page_tokens(longest: int, token: int) -> int:
    """How many tokens' keys and values of a layer (`token` numbers each) a page holds: 16, or as many more as let a page hold eight of the
    `longest` vectors, so that at most an eighth of it is lost at its end.

    >>> page_tokens(1536, 384), page_tokens(96, 64)
    (32, 16)
    """
    tokens = 16
    while tokens * token < 8 * longest:
        tokens *= 2
    return tokens


def paging(layers: Sequence[tuple[int, int]], longest: int) -> tuple[int, int]:
    """(tokens of a layer, numbers) that a page holds, of layers with keys of these (heads, width) and `longest` vectors of adapters.

    >>> paging([(3, 64)] * 30, 1536)
    (32, 12288)
    """
    token = max(2 * heads * width for heads, width in layers)
    tokens = page_tokens(longest, token)
    return tokens, tokens * token


def view(pages: Tensor, page: int, offset: int, rows: int, length: int) -> Tensor:
    """(rows, length), in place."""
    return pages[page, offset : offset + rows * length].view(rows, length)
