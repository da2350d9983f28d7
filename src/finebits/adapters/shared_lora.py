"""DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection (the pair).  Jiang et al., 2025.  arXiv:2502.08905v2.
Use it, by ranking `diffora`, for modules that are not worth an adapter of their own: they still adapt, at almost no cost.

    W_l′ = W_l + s·B A    for all l of one shape,    B ∈ ℝ^{m×r},  A ∈ ℝ^{r×n},    s = α/r

At birth B = 0 and A is uniform in ±1/√n, the same for all: no weight's own start would be that of the others.
Deviations: the paper shares by kind of module; here all weights of a shape do, since no name of a module says what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.adapters._family import Pair


@dataclass(frozen=True)
class SharedLoRA(Pair):
    """One low-rank update of rank `rank` for all matrices of a shape.

    >>> fb.SharedLoRA(rank=8).common(64, 64)  # so many of its numbers are held together
    (1024, 0)
    """

    rank: int = 8
    alpha: float = 8.0
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})
    shared: ClassVar[frozenset[str]] = frozenset({"A", "B"})
