"""LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning.  Pan et al., NeurIPS 2024.  arXiv:2403.17919v4.
Use it with adapter full where all weights are to be trained and gradients and optimizer state of a few blocks have room.

Every K steps γ of the L blocks are drawn, each as likely as any other, and trained for K steps; the others stand still (Algorithm 1):

    S_j ⊂ {1 … L},  |S_j| = γ,    j = ⌊t/K⌋;        θ_l moves for l ∈ S_j alone

Embeddings and head are always trained in the paper: name them in modules_to_save. Without them the memory of a small model is freed.
Deviations: γ blocks are drawn without replacement, as the authors' code does; `draw` "each" draws each block with probability γ/L, as Algorithm
1 does, and draws again where it is none. What the optimizer knows of a block goes when it is left; in the authors' code it stays, so that memory
grows to that of full training.
"""

from __future__ import annotations

from typing import Literal

import torch

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules._layers import Sampled

INTERVALS = 1000  # of which the most blocks are priced where nobody knows how long a run is, or it is longer


class LISA(Sampled):
    """`blocks` is γ, `every` K.

    >>> rule = fb.LISA(blocks=2, every=20)
    >>> [rule.chosen(interval, layers=8) for interval in (0, 1, 2)]
    [[1, 5], [0, 5], [1, 7]]
    >>> each = fb.LISA(blocks=2, every=20, draw="each")
    >>> [len(each.chosen(interval, layers=8)) for interval in range(5)], each.active(8, steps=100)
    ([1, 1, 2, 5, 4], 5)
    """

    def __init__(self, blocks: int = 2, every: int = 20, seed: int = 0, draw: Literal["count", "each"] = "count") -> None:
        if draw not in ("count", "each"):
            raise Invalid(f"LISA draws count blocks of all, or each by itself; draw is {draw!r}")
        super().__init__(blocks, every, seed)
        self.draw = draw

    def active(self, layers: int, steps: int | None = None) -> int:
        if self.draw == "count" or not self.every:
            return super().active(layers)
        many = INTERVALS if steps is None else min(-(-steps // self.every), INTERVALS)
        return max(len(self.chosen(interval, layers)) for interval in range(many))

    def chosen(self, interval: int, layers: int) -> list[int]:
        if self.draw == "count" or not self.every:
            return super().chosen(interval, layers)
        gen = family.generator(self.seed, f"LISA/{interval}")
        found: list[int] = []
        while not found:
            found = (torch.rand(layers, generator=gen) < self.blocks / layers).nonzero()[:, 0].tolist()
        return found
