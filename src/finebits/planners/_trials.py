"""Trials that planners share: what a choice really loses, measured by the caller.

`measure(choice)` quantizes as the choice says and returns the loss that counts, on held-out rows; it is called once for every choice tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from finebits.plan.base import Option
from finebits.plan.knapsack import total

Measure = Callable[[Mapping[str, Option]], float]


def profile(
    menu: Mapping[str, Sequence[Option]], base: Mapping[str, Option], measure: Measure, floor: float = 0.0
) -> dict[str, list[Option]]:
    """The menu with measured losses: how much more is lost than by `base` if one module alone takes the option, at least `floor`.

    One measurement for `base` and one for every other option of every module.
    """
    start = measure(base)
    measured = {}
    for name, options in menu.items():
        rise = [0.0 if o == base[name] else measure({**base, name: o}) - start for o in options]
        measured[name] = [replace(o, loss=max(r, floor)) for o, r in zip(options, rise, strict=True)]
    return measured


def refine(
    choice: Mapping[str, Option], menu: Mapping[str, Sequence[Option]], budget: int, measure: Measure, rounds: int = 1
) -> tuple[dict[str, Option], float]:
    """Greedy on the measured loss, because predicted ones do not add up: module by module, those that lose most first, try the next smaller
    and the next larger option, and keep what measures better within the budget. Returns the choice and its measured loss."""
    now, loss = dict(choice), measure(choice)
    for _ in range(rounds):
        before = dict(now)
        for name in sorted(menu, key=lambda n: -choice[n].loss):
            ranked = sorted(menu[name], key=lambda o: (o.bytes, o.loss))
            at = ranked.index(now[name])
            for other in ranked[max(at - 1, 0) : at] + ranked[at + 1 : at + 2]:
                tried = {**now, name: other}
                if total(tried)[0] <= budget and (trial_loss := measure(tried)) < loss:
                    now, loss = tried, trial_loss
        if now == before:
            break
    return now, loss
