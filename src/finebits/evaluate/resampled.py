"""Intervals of means over rows, and of differences on the same rows: by resampling the rows, seeded, so that two tables over the same rows draw
the same."""

from __future__ import annotations

import numpy as np

RESAMPLES, SEED = 2000, 42
LEAST = 20  # rows: resampling fewer says nothing of rows that were not drawn


class Resampled:
    """Means of per-row sums over rows of these weights (how many labels each has; ones for means of rows).

    >>> rows = Resampled(np.ones(40))
    >>> right = np.array([1.0] * 30 + [0.0] * 10)
    >>> rows.mean(right), [round(v, 2) for v in rows.interval(right)]
    (0.75, [0.62, 0.88])
    >>> Resampled(np.ones(2)).interval(np.ones(2)) is None  # too few rows for one
    True
    """

    def __init__(self, weights: np.ndarray) -> None:
        self.weights, self.rows = weights, len(weights)
        counts = np.random.default_rng(SEED).multinomial(self.rows, np.full(self.rows, 1 / self.rows), size=RESAMPLES).astype(np.float64)
        drawn = counts @ weights
        self.counts, self.drawn = counts[drawn > 0], drawn[drawn > 0]

    def mean(self, sums: np.ndarray | None) -> float | None:
        """Of all rows; None of None."""
        return None if sums is None else float(sums.sum() / self.weights.sum())

    def interval(self, sums: np.ndarray | None) -> list[float] | None:
        """The middle 95% of the means of resamples; None where rows are fewer than LEAST."""
        if sums is None or self.rows < LEAST:
            return None
        return [float(v) for v in np.quantile(self.counts @ sums / self.drawn, (0.025, 0.975))]

    def minus(self, a: np.ndarray | None, b: np.ndarray | None) -> list[float | None] | None:
        """[mean difference, its interval's ends], on the same resamples."""
        return None if a is None or b is None else [self.mean(a - b), *(self.interval(a - b) or (None, None))]
