"""LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning.  Pan et al., NeurIPS 2024.  arXiv:2403.17919v4.
Use it with adapter full where all weights are to be trained and gradients and optimizer state of a few blocks have room.

Every K steps γ of the L blocks are drawn, each as likely as any other, and trained for K steps; the others stand still (Algorithm 1):

    S_j ⊂ {1 … L},  |S_j| = γ,    j = ⌊t/K⌋;        θ_l moves for l ∈ S_j alone

Embeddings and head are always trained in the paper: name them in modules_to_save. Without them the memory of a small model is freed.
Deviations: γ blocks are drawn without replacement, as the authors' code does, where Algorithm 1 draws each with probability γ/L. What the
optimizer knows of a block goes when it is left; in the authors' code it stays, so that memory grows to that of full training.
"""

from __future__ import annotations

from finebits.rules._layers import Sampled


class LISA(Sampled):
    """`blocks` is γ, `every` K.

    >>> rule = fb.LISA(blocks=2, every=20)
    >>> [rule.chosen(interval, layers=8) for interval in (0, 1, 2)]
    [[1, 5], [0, 5], [1, 7]]
    """

    def __init__(self, blocks: int = 2, every: int = 20, seed: int = 0) -> None:
        super().__init__(blocks, every, seed)
