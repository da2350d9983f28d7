"""One choice for all: the baseline that every planner must beat.

Among the options that every module offers (the same format, quantizer and start, and the same adapter where that is chosen as well), the one
with the least total loss that fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.plan.base import Infeasible, Option, Spec
from finebits.plan.knapsack import check, dual_bound, shared_specs, smallest
from finebits.plan.planner import Menu, Planner, Solution
from finebits.sizes import show


@dataclass(frozen=True)
class Uniform(Planner):
    """The best single spec for all modules.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> {name: o.bytes for name, o in fb.Uniform()(menu, 30).items()}  # two of 20 do not fit
    {'a': 10, 'b': 10}
    """

    honours: ClassVar[frozenset[str]] = frozenset({"ranks"})
    because: ClassVar[str] = "gives all matrices one candidate"
    widens: ClassVar[bool] = True

    def __call__(self, menu: Menu, budget: int) -> Solution:
        check(menu)
        if not menu:
            return Solution({}, 0.0)
        by_spec: dict[Spec, dict[str, Option]] = {}
        for name, specs in shared_specs(menu).items():
            for o, spec in zip(menu[name], specs, strict=True):
                by_spec.setdefault(spec, {})[name] = o
        complete = [c for c in by_spec.values() if len(c) == len(menu)]
        fitting = [c for c in complete if sum(o.bytes for o in c.values()) <= budget]
        if not fitting:
            least = min((sum(o.bytes for o in c.values()) for c in complete), default=smallest(menu))
            raise Infeasible(f"no single format for all modules fits {show(budget)}; the smallest takes {show(least)}", least)
        best = min(fitting, key=lambda c: (sum(o.loss for o in c.values()), sum(o.bytes for o in c.values())))
        return Solution(best, dual_bound(menu, budget))
