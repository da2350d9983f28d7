"""Quantile medians of N(0, 1): 2^b values of which every one is the median of what is nearest to it, the fixed point of k-medians."""

from __future__ import annotations

import functools

import torch


@functools.cache
def medians(bits: int) -> tuple[float, ...]:
    """The grid, ascending.

    >>> [round(v, 4) for v in medians(2)]
    [-1.2657, -0.3778, 0.3778, 1.2657]
    """
    Phi, quantile = torch.special.ndtr, torch.special.ndtri
    v = quantile((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(500):
        edges = Phi((v[1:] + v[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_ones(1)])
        v = quantile((edges[1:] + edges[:-1]) / 2)
    return tuple(v.float().tolist())
