"""What goes is drawn: what every other way of pruning is measured against (LoRAM-Rand in arXiv:2502.13533v1).

    S_ij ~ U(0, 1),    from (seed, name of the matrix) alone

Use it to see what another pruner brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class Random:
    """No weight is worth more than another.

    >>> fb.Random()(torch.zeros(2, 3), {}, torch.Generator()).shape
    torch.Size([2, 3])
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    back: ClassVar[bool] = True

    def __call__(self, W: Float[Tensor, "m n"], stats: Stats, gen: Generator) -> Float[Tensor, "m n"]:
        return torch.rand(W.shape, generator=gen)
