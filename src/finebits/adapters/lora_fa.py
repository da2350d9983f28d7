"""LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning.  Zhang et al., 2023.  arXiv:2308.03303v1.
Use it when activations are what does not fit: of a layer's input r numbers a token are kept for the backward pass.

    W′ = W + s·B A,    A ∈ ℝ^{r×n} frozen,  B ∈ ℝ^{m×r} trained,    ∂L/∂B = s·gᵀ (x Aᵀ),    s = α/r

It is LoRA whose A stays as it was born or started. At birth B = 0 and A is uniform in ±1/√n.
Deviations: the paper draws A from a Gaussian; the range above is LoRA's, so that both start alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.adapters._family import Pair


@dataclass(frozen=True)
class LoRAFA(Pair):
    """A low-rank update of which B alone is trained.

    >>> adapter = fb.LoRAFA(rank=16)
    >>> adapter.size(3072, 1024), adapter.stored(3072, 1024)  # r·m trained, r·n beside them
    (49152, 16384)
    """

    rank: int = 16
    alpha: float = 16.0
    frozen: ClassVar[frozenset[str]] = frozenset({"A"})
