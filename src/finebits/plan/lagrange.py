"""Generalized Lagrange multiplier method for solving problems of optimum allocation.  Everett, Operations Research 11(3), 1963.

A byte gets a price λ; every module then chooses alone:

    x(λ) = argmin Σ loss_i(x_i) + λ Σ bytes_i(x_i),     the smallest λ whose choice fits the budget

What is left of the budget is spent greedily on single changes, best saving of loss a byte first. The dual value at the best λ is a lower
bound on any choice's loss, so the gap to the optimum is known (`_knapsack.dual_bound`).
Deviations: λ is not bisected but searched among the slopes of the modules' convex hulls, the only values where a choice can change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finebits.plan._knapsack import check, priced, prices, total
from finebits.plan.base import Option


@dataclass(frozen=True)
class Lagrange:
    """The default planner: near-optimal in milliseconds, with a certificate."""

    def __call__(self, menu: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
        check(menu, budget)
        candidates = prices(menu)
        low, high = 0, len(candidates)  # the first price whose choice fits; past the last slope every module is at its smallest
        while low < high:
            middle = (low + high) // 2
            if total(priced(menu, candidates[middle] * (1 + 1e-12)))[0] <= budget:
                high = middle
            else:
                low = middle + 1
        price = candidates[low] * (1 + 1e-12) if low < len(candidates) else float("inf")
        choice = priced(menu, price) if price < float("inf") else {k: min(v, key=lambda o: (o.bytes, o.loss)) for k, v in menu.items()}
        return spend(choice, menu, budget)


def spend(choice: dict[str, Option], menu: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """Use what is left of the budget: the single change that saves most loss a byte, again and again."""
    choice = dict(choice)
    left = budget - total(choice)[0]
    while True:
        best: tuple[float, str, Option] | None = None
        for name in sorted(menu):
            now = choice[name]
            for o in menu[name]:
                extra, saved = o.bytes - now.bytes, now.loss - o.loss
                if saved <= 0 or extra > left:
                    continue
                rate = saved / extra if extra > 0 else float("inf")
                if best is None or rate > best[0]:
                    best = rate, name, o
        if best is None:
            return choice
        _, name, o = best
        left -= o.bytes - choice[name].bytes
        choice[name] = o
