"""Generalized Lagrange multiplier method for solving problems of optimum allocation.  Everett, Operations Research 11(3), 1963.

A byte gets a price λ; every module then chooses alone:

    x(λ) = argmin Σ loss_i(x_i) + λ Σ bytes_i(x_i),     the smallest λ whose choice fits the budget

What is left of the budget is spent on single changes, best saving of loss a byte first, or on the best exchange among the dozen modules that
are nearest to changing their mind, where that saves more. The dual value at the best λ is a lower bound on
any choice's loss, so the gap to the optimum is known (`Solution.bound`).
Deviations: λ is not bisected but walked down the slopes of the modules' convex hulls, the only values where a choice can change; of
modules that change their mind at the same λ, only as many do as fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.plan.knapsack import hull
from finebits.plan.planner import Menu, Planner, Solution


@dataclass(frozen=True)
class Lagrange(Planner):
    """The default planner: near-optimal in milliseconds, with a certificate.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> {name: o.bytes for name, o in fb.Lagrange()(menu, 30).items()}  # ten bytes more do most for a
    {'a': 20, 'b': 10}
    """

    deputy: ClassVar[str] = "milp"
    minimises: ClassVar[bool] = True
    widens: ClassVar[bool] = True

    def __call__(self, menu: Menu, budget: int) -> Solution:
        return hull(menu, budget)
