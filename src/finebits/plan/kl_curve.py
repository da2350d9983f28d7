"""From a sum of predicted losses to what will be measured: a line in logarithms through variants that were really evaluated.

    log KL = a + b·log S + ε,    b > 0

S is the plan's predicted loss; the interval is the textbook one for a new observation, t quantile with n − 2 degrees of freedom, and ε has at
least the sampling error of the measurements. With two variants there is no freedom left, and one is taken (a wide interval, honestly).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from finebits.errors import Invalid

SHARE = 0.8  # of predictions that the interval is to cover
T80 = {1: 3.078, 2: 1.886, 3: 1.638, 4: 1.533, 5: 1.476, 6: 1.440, 7: 1.415, 8: 1.397}  # 90% quantiles of Student's t: 80% between ±


class Point(NamedTuple):
    """One evaluated variant: predicted sum, measured KL, and the relative standard error of the measurement."""

    predicted: float
    measured: float
    error: float = 0.0


class KLCurve(NamedTuple):
    """log KL = a + b log S, with what its interval needs.

    >>> curve = fit([Point(1.0, 2.0), Point(10.0, 20.0)])
    >>> round(curve.b, 4), curve(0.0)
    (1.0, (0.0, 0.0, 0.0))
    """

    a: float
    b: float
    spread: float
    count: int
    middle: float
    width: float

    def __call__(self, predicted: float) -> tuple[float, float, float]:
        """Low end, best guess and high end of the KL of a plan with this predicted sum; nothing predicted is nothing lost."""
        if predicted <= 0:
            return 0.0, 0.0, 0.0
        x = math.log(predicted)
        best = self.a + self.b * x
        half = T80[min(max(self.count - 2, 1), 8)] * self.spread * math.sqrt(1 + 1 / self.count + (x - self.middle) ** 2 / self.width)
        return math.exp(best - half), math.exp(best), math.exp(best + half)


def fit(points: Sequence[Point]) -> KLCurve:
    """The line through at least two variants of different size. Raises ValueError where they cannot say how KL grows.

    >>> low, best, high = fit([Point(1.0, 2.0), Point(10.0, 20.0)])(5.0)  # the KL has been twice what was predicted
    >>> round(best, 4)
    10.0
    """
    points = [p for p in points if p.predicted > 0 and p.measured > 0]
    xs, ys = [math.log(p.predicted) for p in points], [math.log(p.measured) for p in points]
    if len(set(xs)) < 2:
        raise Invalid(f"a prediction of KL needs two evaluated variants that lose something and differ; there are {len(set(xs))}")
    n = len(xs)
    middle, level = sum(xs) / n, sum(ys) / n
    width = sum((x - middle) ** 2 for x in xs)
    b = sum((x - middle) * (y - level) for x, y in zip(xs, ys, strict=True)) / width
    if b <= 0:
        raise Invalid("the evaluated variants lose less where more was predicted: the objective does not suit this model; use another")
    a = level - b * middle
    residual = sum((y - a - b * x) ** 2 for x, y in zip(xs, ys, strict=True)) / max(n - 2, 1)
    sampling = sum(p.error**2 for p in points) / n
    return KLCurve(a, b, math.sqrt(max(residual, sampling)), n, middle, width)
