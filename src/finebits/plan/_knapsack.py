"""The multiple-choice knapsack that planners share: pick one option a module, losses add up, bytes stay within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finebits.plan.base import Infeasible, Option
from finebits.sizes import show

Menu = Mapping[str, Sequence[Option]]


def check(menu: Menu, budget: int | None = None) -> None:
    """Raise if a module has no option, or if even the smallest options together exceed a given budget."""
    for name, options in menu.items():
        if not options:
            raise ValueError(f"{name} has no option: every candidate was excluded")
    least = smallest(menu)
    if budget is not None and least > budget:
        raise Infeasible(f"the smallest choice holds {show(least)} of weights, and {show(budget)} are left for them", least)


def smallest(menu: Menu) -> int:
    """The least number of bytes that any choice holds."""
    return sum(min(o.bytes for o in options) for options in menu.values())


def priced(menu: Menu, price: float) -> dict[str, Option]:
    """The best choice when a byte costs `price`; ties go to fewer bytes."""
    return {name: min(options, key=lambda o: (o.loss + price * o.bytes, o.bytes)) for name, options in menu.items()}


def total(choice: Mapping[str, Option]) -> tuple[int, float]:
    """Bytes and loss of a choice."""
    return sum(o.bytes for o in choice.values()), sum(o.loss for o in choice.values())


def prices(menu: Menu) -> list[float]:
    """Every price at which some module changes its mind: the slopes of the lower convex hulls, ascending."""
    found = {0.0}
    for options in menu.values():
        hull: list[Option] = []
        for o in sorted(options, key=lambda o: (o.bytes, o.loss)):
            if hull and o.loss >= hull[-1].loss:
                continue
            while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], o):
                hull.pop()
            hull.append(o)
        found.update(slope(a, b) for a, b in zip(hull, hull[1:]))
    return sorted(found)


def slope(a: Option, b: Option) -> float:
    """Loss saved for each byte more, from a to the larger b."""
    return (a.loss - b.loss) / max(b.bytes - a.bytes, 1)


def dual_bound(menu: Menu, budget: int) -> float:
    """No choice within the budget has a smaller loss: max over prices of Σ min(loss + price·bytes) − price·budget."""
    best = -float("inf")
    for price in prices(menu):
        value = sum(min(o.loss + price * o.bytes for o in options) for options in menu.values()) - price * budget
        best = max(best, value)
    return best
