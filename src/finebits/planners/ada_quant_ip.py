"""Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming.  Hubara et al., 2020.  arXiv:2006.10518v2.

The integer program (section 4) over measured losses: ΔL_l is what the model loses when layer l alone is changed from the base precision,

    min Σ ΔL_l(c) x_lc    s.t.    Σ_c x_lc = 1,    Σ size_l(c) x_lc ≤ total·D,    and, with `latency`, Σ T_l(c) x_lc ≤ latency

`profiled` measures the ΔL (one run of the model a layer and option, floored at 1e-6 as in the code); `target` is the budget of a share D of
float32; `cheapest` is the dual, the least size at which no more than a given loss is lost; `refine` walks on from a plan by measured loss.
Deviations: the paper gains what a layer saves against 8 bits, which is the same program; solved by HiGHS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from finebits.errors import Invalid
from finebits.plan.base import Option
from finebits.plan.knapsack import frontier
from finebits.plan.planner import Menu, Planner, Solution
from finebits.planners._highs import Limit, Sides, solve
from finebits.planners._trials import Measure, profile, refine

__all__ = ["AdaQuantIP", "cheapest", "profiled", "refine", "target"]

FLOOR = 1e-6


@dataclass(frozen=True)
class AdaQuantIP(Planner):
    """Exact; the budget is bytes. `latency` limits Σ Option.more["latency"] as well, in the unit of the menu. Needs the extra milp.

    >>> slow, fast = {"latency": 2.0}, {"latency": 1.0}
    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0, slow), fb.Option(many, 20, 1.0, fast)], "b": [fb.Option(few, 10, 3.0, slow)]}
    >>> {name: o.bytes for name, o in fb.AdaQuantIP(latency=3.0)(menu, 30).items()}
    {'a': 20, 'b': 10}
    """

    latency: float | None = None
    exact: ClassVar[bool] = True
    honours: ClassVar[frozenset[str]] = frozenset({"fixed", "head", "ranks", "latency"})

    @property
    def minimises(self) -> bool:  # it depends on the settings
        return self.latency is None

    @property
    def asks(self) -> frozenset[str]:
        return frozenset() if self.latency is None else frozenset({"latency"})

    def __call__(self, menu: Menu, budget: int) -> Solution:
        if self.latency is None:
            return solve(menu, budget)
        for name, options in menu.items():
            if any("latency" not in o.more for o in options):
                raise Invalid(f"a limit on latency needs Option.more['latency'] for every option, and {name} has one without")
        limit = Limit(lambda o: float(o.more["latency"]), self.latency, f"a latency of {self.latency:g}")
        return solve(menu, budget, Sides((limit,)))


def profiled(menu: Menu, base: Mapping[str, Option], measure: Measure) -> dict[str, list[Option]]:
    """The menu with ΔL_l(c) for losses: `measure` is the model's loss under a choice, `base` the precision that all layers else have.

    >>> few, many = fb.Option(fb.Spec(fb.NF(2)), 10, 5.0), fb.Option(fb.Spec(fb.NF(4)), 20, 1.0)
    >>> measure = lambda choice: 2.0 if choice["a"] is many else 2.5  # of a model
    >>> [o.loss for o in profiled({"a": [few, many]}, {"a": many}, measure)["a"]]
    [0.5, 1e-06]
    """
    return profile(menu, base, measure, FLOOR)


def target(weights: int, D: float) -> int:
    """Bytes of a share D of the float32 size of `weights` weights; D = 0.25 is eight bits everywhere.

    >>> target(1000, D=0.25)
    1000
    """
    return int(4 * weights * D)


def cheapest(menu: Menu, loss: float) -> dict[str, Option]:
    """The choice of the fewest bytes that loses at most `loss`. Exact, for small menus. Raises ValueError where none does.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> {name: o.bytes for name, o in cheapest(menu, loss=4.0).items()}
    {'a': 20, 'b': 10}
    """
    front = frontier(menu)
    good = np.flatnonzero(front.loss <= loss)
    if not len(good):
        raise Invalid(f"no choice loses at most {loss:g}: the best loses {front.loss[-1]:g}")
    return front.pick(int(good[0]))
