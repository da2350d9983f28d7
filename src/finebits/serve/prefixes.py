"""Keys and values of beginnings that requests share, such as a system prompt: a block of a prompt is computed once for all requests of one
adapter that begin so.

Efficient Memory Management for Large Language Model Serving with PagedAttention.  Kwon et al., SOSP 2023.  arXiv:2309.06180v1, section 4.4
(shared prefix): whole pages, shared and counted, kept while nobody else needs them.

A block is found by the block before it and its own tokens, the first by its adapter's number, compared and not hashed alone: another adapter's
blocks, or those of a version of it that was unloaded, are never found.
Deviations: a block never used twice leaves before any that was, whenever that was: the prompts of strangers do not push out what all share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from finebits.serve.pages import Pool

Place = tuple[int | None, int, tuple[int, ...]]  # the adapter (None: the model alone), the block before (0: none), the tokens


class Age(NamedTuple):
    """Who leaves first is smaller."""

    wanted: bool
    used: int
    depth: int


@dataclass(eq=False)
class Block:
    """Some tokens of a prompt, in a page of every layer. `uses` counts the requests that run over it."""

    number: int
    place: Place
    pages: list[int]
    depth: int
    uses: int = 0
    used: int = 0
    hits: int = 0

    @property
    def age(self) -> Age:
        return Age(self.hits > 0, self.used, -self.depth)


class Prefixes:
    """The blocks of an engine, of `tokens` each. Its methods are called under the engine's lock."""

    def __init__(self, pool: Pool, tokens: int, clock: Iterator[int]) -> None:
        self.pool, self.tokens, self.clock = pool, tokens, clock
        self.blocks: dict[Place, Block] = {}
        self.hits = self.evictions = 0
        self._numbers = itertools.count(1)

    def found(self, adapter: int | None, prompt: Sequence[int]) -> list[Block]:
        """The longest beginning of a prompt that is here, in use from now on; its last token is left to be computed."""
        chain: list[Block] = []
        for at in range(0, len(prompt) - self.tokens, self.tokens):
            block = self.blocks.get(self._place(adapter, chain, prompt[at : at + self.tokens]))
            if block is None:
                break
            chain.append(block)
        now = next(self.clock)
        for block in chain:
            block.uses, block.used, block.hits = block.uses + 1, now, block.hits + 1
        self.hits += len(chain)
        return chain

    def keep(self, adapter: int | None, chain: Sequence[Block], tokens: Sequence[int], pages: list[int]) -> tuple[Block, bool]:
        """(the block of these tokens after `chain`, in use; whether its pages are now its own). Where another request has brought it meanwhile
        it is that one, and `pages` are free."""
        place = self._place(adapter, chain, tokens)
        block = self.blocks.get(place)
        new = block is None
        if block is None:
            block = self.blocks[place] = Block(next(self._numbers), place, pages, len(chain))
            self.pool.pass_on(pages, block)
        else:
            self.pool.give(pages)
            block.hits += 1
        block.uses, block.used = block.uses + 1, next(self.clock)
        return block, new

    def _place(self, adapter: int | None, chain: Sequence[Block], tokens: Sequence[int]) -> Place:
        return adapter, chain[-1].number if chain else 0, tuple(tokens)

    def release(self, chain: Sequence[Block]) -> None:
        """A request over these is over."""
        now = next(self.clock)
        for block in chain:
            block.uses, block.used = block.uses - 1, now

    def idle(self) -> list[Block]:
        """Those that no request runs over."""
        return [block for block in self.blocks.values() if not block.uses]

    def evict(self, block: Block) -> None:
        del self.blocks[block.place]
        self.pool.give(block.pages)
        self.evictions += 1

    def forget(self, adapter: int) -> None:
        """An adapter has left: nobody can ask for its blocks again."""
        for block in [b for b in self.blocks.values() if b.place[0] == adapter]:
            self.evict(block)
