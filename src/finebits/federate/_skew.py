"""Rows dealt to clients who each see other kinds of them: Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification.  Hsu, Qi, Brown, 2019.  arXiv:1909.06335: of every kind, clients get shares that are drawn from Dir(α)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from finebits.errors import Invalid


def dirichlet(kinds: Sequence[Hashable], clients: int, alpha: float, seed: int) -> list[list[int]]:
    """Row numbers of every client, ascending. The smaller α, the fewer kinds a client sees; every client has a row at least, and which client
    gets what depends on seed, α, kinds and the number of clients alone.

    >>> dealt = dirichlet(["a"] * 50 + ["b"] * 50, clients=2, alpha=100.0, seed=0)
    >>> [sum(i < 50 for i in rows) for rows in dealt], sorted(sum(dealt, [])) == list(range(100))  # of "a"
    ([24, 26], True)
    """
    if clients < 1 or clients > len(kinds):
        raise Invalid(f"{len(kinds)} training rows cannot be dealt to {clients} clients: every client is to have one at least")
    if not alpha > 0:
        raise Invalid(f"alpha is {alpha}; it must be positive: large for clients that are alike, small for clients of few kinds of rows")
    gen = np.random.default_rng([seed, clients])
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for kind in sorted(set(kinds), key=str):
        rows = gen.permutation([i for i, k in enumerate(kinds) if k == kind])
        ends = np.rint(np.cumsum(gen.dirichlet(np.full(clients, alpha))) * len(rows)).astype(int)
        for client, part in enumerate(np.split(rows, ends[:-1])):
            dealt[client] += part.tolist()
    for rows in dealt:
        if not rows:  # from whoever has most
            richest = max(dealt, key=len)
            rows.append(richest.pop())
    return [sorted(rows) for rows in dealt]
