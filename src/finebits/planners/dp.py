"""Discrete dynamic programming and capital allocation.  Nemhauser and Ullmann, Management Science 15(9), 1969.

Module by module, every partial choice that another beats in both bytes and loss is dropped; what is left after the last module holds the
optimum of every budget:

    F_i = undominated { (bytes + bytes_i(j), loss + loss_i(j)) : (bytes, loss) ∈ F_{i−1}, j an option of i }

Deviations: partial choices that no rest would fit beside are dropped as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.plan.knapsack import dual_bound, frontier
from finebits.plan.planner import Menu, Planner, Solution


@dataclass(frozen=True)
class DP(Planner):
    """Exact, for small menus: at most `states` partial choices are held, and more of them are an error.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> {name: o.bytes for name, o in fb.DP()(menu, 30).items()}
    {'a': 20, 'b': 10}
    """

    states: int = 1_000_000
    exact: ClassVar[bool] = True
    minimises: ClassVar[bool] = True

    def __call__(self, menu: Menu, budget: int) -> Solution:
        return Solution(frontier(menu, budget, self.states).pick(-1), dual_bound(menu, budget))
