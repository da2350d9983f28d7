"""The multiple-choice knapsack that planners share: pick one option a module, losses add up, bytes stay within the budget.

A menu is turned into arrays once. What no budget would pick (an option that is no better than a smaller one) is left out, modules stand in
the order of their names, so that nothing depends on the order of the menu, and two ways to solve it follow: `hull`, near-optimal, with the
bound that says how near, and `frontier`, exact, for small menus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from finebits.errors import Invalid
from finebits.plan.base import Infeasible, Option, Spec
from finebits.plan.planner import Menu, Solution
from finebits.sizes import show


def check(menu: Menu, budget: int | None = None) -> None:
    """Raise if a module has no option, or if even the smallest options together exceed a given budget.

    >>> check({"q_proj": []})
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: q_proj has no option: every candidate was excluded
    """
    for name, options in menu.items():
        if not options:
            raise Invalid(f"{name} has no option: every candidate was excluded")
    least = smallest(menu)
    if budget is not None and least > budget:
        raise Infeasible(f"the smallest choice holds {show(least)} of weights, and {show(budget)} are left for them", least)


def smallest(menu: Menu) -> int:
    """The least number of bytes that any choice holds.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> smallest({"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0)]})
    20
    """
    return sum(min(o.bytes for o in options) for options in menu.values())


def total(choice: Mapping[str, Option]) -> tuple[int, float]:
    """Bytes and loss of a choice.

    >>> total({"a": fb.Option(fb.Spec(fb.NF(4)), 20, 1.0), "b": fb.Option(fb.Spec(fb.NF(2)), 10, 3.0)})
    (30, 4.0)
    """
    return sum(o.bytes for o in choice.values()), sum(o.loss for o in choice.values())


def shared_specs(menu: Menu) -> dict[str, list[Spec]]:
    """The specs of a menu as several modules may share them: without adapters, unless these are a part of the choice.

    >>> option = fb.Option(fb.Spec(fb.NF(4), adapter=fb.LoRA()), 20, 1.0)
    >>> [specs[0].adapter for specs in shared_specs({"a": [option], "b": [option]}).values()]  # one for all is no part of the choice
    [None, None]
    """
    varied = any(len({o.spec.adapter for o in options}) > 1 for options in menu.values())
    return {name: [o.spec if varied else replace(o.spec, adapter=None) for o in options] for name, options in menu.items()}


class Ladder(NamedTuple):
    """One module's options that some budget might pick: bytes rise, losses fall. `options` are their places in the menu.

    >>> menu = {"a": [fb.Option(fb.Spec(fb.NF(2)), 10, 5.0), fb.Option(fb.Spec(fb.NF(3)), 15, 6.0), fb.Option(fb.Spec(fb.NF(4)), 20, 1.0)]}
    >>> ladders(menu)[0].options.tolist()  # no budget would pick the second
    [0, 2]
    """

    name: str
    bytes: np.ndarray
    loss: np.ndarray
    options: np.ndarray


def ladders(menu: Menu) -> list[Ladder]:
    """Every module's ladder, by name.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"b": [fb.Option(many, 20, 1.0), fb.Option(few, 10, 5.0)], "a": [fb.Option(few, 10, 3.0)]}
    >>> [(ladder.name, ladder.bytes.tolist(), ladder.loss.tolist()) for ladder in ladders(menu)]
    [('a', [10], [3.0]), ('b', [10, 20], [5.0, 1.0])]
    """
    rungs = []
    for name in sorted(menu):
        size = np.array([o.bytes for o in menu[name]], dtype=np.int64)
        loss = np.array([o.loss for o in menu[name]], dtype=np.float64)
        order = np.lexsort((loss, size))
        least = np.minimum.accumulate(loss[order])
        kept = order[np.concatenate(([True], least[1:] < least[:-1]))]
        rungs.append(Ladder(name, size[kept], loss[kept], kept))
    return rungs


class Steps(NamedTuple):
    """The steps along the lower convex hulls of all modules, in the order in which a growing budget takes them: of falling `rate`, the loss
    saved a byte. Step i takes the module `owner` up to the rung `rung`, costs `bytes` more and saves `loss`."""

    owner: np.ndarray
    rung: np.ndarray
    bytes: np.ndarray
    loss: np.ndarray

    @property
    def rate(self) -> np.ndarray:
        return self.loss / self.bytes


def steps(rungs: Sequence[Ladder]) -> Steps:
    """The hulls' steps. A step of a module never comes before the one below it: rates fall along a hull.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> steps(ladders(menu)).rate.tolist()  # a saves 4 for ten bytes, b half of one
    [0.4, 0.05]
    """
    rows: list[tuple[float, int, int, int, float]] = []
    for owner, ladder in enumerate(rungs):
        size, loss = ladder.bytes.tolist(), ladder.loss.tolist()
        hull = [0]
        for j in range(1, len(size)):
            while len(hull) > 1 and _rate(size, loss, hull[-2], hull[-1]) <= _rate(size, loss, hull[-1], j):
                hull.pop()
            hull.append(j)
        rows += [(-_rate(size, loss, a, b), owner, b, size[b] - size[a], loss[a] - loss[b]) for a, b in zip(hull, hull[1:])]
    rows.sort()
    at = lambda i, dtype: np.array([r[i] for r in rows], dtype=dtype)  # noqa: E731
    return Steps(at(1, np.int64), at(2, np.int64), at(3, np.int64), at(4, np.float64))


def _rate(size: list[int], loss: list[float], a: int, b: int) -> float:
    return (loss[a] - loss[b]) / (size[b] - size[a])


def hull(menu: Menu, budget: int) -> Solution:
    """Steps of falling rate until one does not fit; what is left then goes to single changes of modules, best saving a byte first, and to
    the best exchange among the modules that are nearest to changing their mind (`_exchange`), whichever saves more.

    The choice at the last step that fits is optimal for the bytes that it holds; the changes are one pass through one list, and the exchange
    is optimal among its modules: so a larger budget never loses more.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> found = hull(menu, 30)
    >>> {name: o.bytes for name, o in found.items()}, found.loss, found.bound  # loss and bound are one: this is the optimum
    ({'a': 20, 'b': 10}, 4.0, 4.0)
    """
    check(menu, budget)
    rungs = ladders(menu)
    climb = steps(rungs)
    left = budget - sum(int(r.bytes[0]) for r in rungs)
    bound = _bound(rungs, climb, left)
    climbed = int(np.searchsorted(np.cumsum(climb.bytes), left, side="right"))
    left -= int(climb.bytes[:climbed].sum())
    at = np.zeros(len(rungs), dtype=np.int64)
    np.maximum.at(at, climb.owner[:climbed], climb.rung[:climbed])
    if climbed == len(climb.bytes):
        return Solution(_chosen(menu, rungs, at), bound)
    moves, saved = _singles(rungs, at, left)
    exchange = _exchange(rungs, at, left, float(climb.rate[climbed]), saved)
    for owner, j in (moves if exchange is None else exchange).items():
        at[owner] = j
    return Solution(_chosen(menu, rungs, at), bound)


def _singles(rungs: Sequence[Ladder], at: np.ndarray, left: int) -> tuple[dict[int, int], float]:
    """One pass through all changes of one module that fit, best saving a byte first, each module once; and what they save."""
    changes: list[tuple[float, int, int, int]] = []
    for owner, ladder in enumerate(rungs):
        extra, saved = ladder.bytes - ladder.bytes[at[owner]], ladder.loss[at[owner]] - ladder.loss
        fits = np.flatnonzero((extra > 0) & (extra <= left))
        changes += [(-saved[j] / extra[j], int(extra[j]), owner, int(j)) for j in fits]
    moved: dict[int, int] = {}
    gain = 0.0
    for rate, extra, owner, j in sorted(changes):
        if extra <= left and owner not in moved:
            moved[owner], left, gain = j, left - extra, gain - rate * extra
    return moved, gain


CORE = 12  # modules that may be exchanged against each other
STATES = 50_000  # partial exchanges that are held at most; beyond, the single changes stand


def _exchange(rungs: Sequence[Ladder], at: np.ndarray, left: int, price: float, known: float) -> dict[int, int] | None:
    """The exchange (some modules up, others down) that saves most within `left` bytes; None where nothing saves more than `known`.

    A change costs Δloss + price·Δbytes ≥ 0, and an exchange that saves more than `known` costs less than price·left − known in all: what
    costs more is left out, and of the modules those CORE with the cheapest change take part.
    """
    allowance = price * left - known
    cheap: list[tuple[float, int, np.ndarray, np.ndarray, np.ndarray]] = []
    for owner, ladder in enumerate(rungs):
        extra, lost = ladder.bytes - ladder.bytes[at[owner]], ladder.loss - ladder.loss[at[owner]]
        cost = lost + price * extra
        kept = np.flatnonzero(cost < allowance)
        kept = kept[kept != at[owner]]
        if len(kept):
            cheap.append((float(cost[kept].min()), owner, kept, extra[kept], lost[kept]))
    core = sorted(cheap, key=lambda c: c[:2])[:CORE]
    size, loss, trail = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for _, _, _, extra, lost in core:
        sizes = np.concatenate((size, (size[:, None] + extra).ravel()))
        losses = np.concatenate((loss, (loss[:, None] + lost).ravel()))
        before = np.concatenate((np.arange(len(size)), np.repeat(np.arange(len(size)), len(extra))))
        change = np.concatenate((np.full(len(size), -1), np.tile(np.arange(len(extra)), len(size))))
        keep = np.flatnonzero(losses + price * sizes < allowance + 1e-15)
        order = keep[np.lexsort((losses[keep], sizes[keep]))]
        least = np.minimum.accumulate(losses[order])
        order = order[np.concatenate(([True], least[1:] < least[:-1]))]
        if len(order) > STATES:
            return None
        size, loss = sizes[order], losses[order]
        trail.append((before[order], change[order]))
    fits = np.flatnonzero(size <= left)
    if not core or not len(fits):
        return None
    i = int(fits[np.argmin(loss[fits])])
    if not -loss[i] > known:
        return None
    exchange: dict[int, int] = {}
    for (_, owner, kept, _, _), (before, change) in zip(reversed(core), reversed(trail), strict=True):
        if change[i] >= 0:
            exchange[owner] = int(kept[change[i]])
        i = int(before[i])
    return exchange


def _chosen(menu: Menu, rungs: Sequence[Ladder], at: Sequence[int] | np.ndarray) -> dict[str, Option]:
    picked = {r.name: menu[r.name][int(r.options[int(j)])] for r, j in zip(rungs, at, strict=True)}
    return {name: picked[name] for name in menu}


def dual_bound(menu: Menu, budget: int) -> float:
    """No choice within the budget has a smaller loss: max over prices of Σ min(loss + price·bytes) − price·budget.

    It is the loss along the hulls' steps with the last one taken in part. Infinity where nothing fits.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> dual_bound(menu, 25), dual_bound(menu, 15)  # 8 and half of the step of a; nothing fits
    (6.0, inf)
    """
    rungs = ladders(menu)
    climb = steps(rungs)
    left = budget - sum(int(r.bytes[0]) for r in rungs)
    return float("inf") if left < 0 else _bound(rungs, climb, left)


def _bound(rungs: Sequence[Ladder], climb: Steps, left: int) -> float:
    """The same of `left` bytes beyond the smallest choice."""
    climbed = int(np.searchsorted(np.cumsum(climb.bytes), left, side="right"))
    loss = sum(float(r.loss[0]) for r in rungs) - float(climb.loss[:climbed].sum())
    if climbed < len(climb.bytes):
        loss -= float(climb.rate[climbed]) * (left - int(climb.bytes[:climbed].sum()))
    return loss


class Front(NamedTuple):
    """Every choice that no other beats in both bytes and loss, bytes rising; `pick(i)` gives one of them.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> front = frontier({"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0)]})
    >>> {name: o.bytes for name, o in front.pick(-1).items()}
    {'a': 20, 'b': 10}
    """

    menu: Menu
    rungs: list[Ladder]
    bytes: np.ndarray
    loss: np.ndarray
    trail: list[tuple[np.ndarray, np.ndarray]]  # per module: the state before, and the rung

    def pick(self, i: int) -> dict[str, Option]:
        at = []
        for before, rung in reversed(self.trail):
            at.append(int(rung[i]))
            i = int(before[i])
        return _chosen(self.menu, self.rungs, at[::-1])


def frontier(menu: Menu, budget: int | None = None, most: int = 1_000_000) -> Front:
    """All undominated choices within the budget, module by module. Raises ValueError where more than `most` would have to be held.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> front = frontier(menu)  # to spend on b alone is beaten
    >>> front.bytes.tolist(), front.loss.tolist()
    ([20, 30, 40], [8.0, 4.0, 3.5])
    """
    check(menu, budget)
    rungs = ladders(menu)
    size, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail, rest = [], sum(int(r.bytes[0]) for r in rungs)
    for done, ladder in enumerate(rungs):
        rest -= int(ladder.bytes[0])
        if len(size) * len(ladder.bytes) > 8 * most:
            raise Invalid(f"an exact plan would hold more than {most:,} partial choices after {done} modules: use lagrange or milp")
        sizes, losses = (size[:, None] + ladder.bytes).ravel(), (loss[:, None] + ladder.loss).ravel()
        keep = np.arange(len(sizes)) if budget is None else np.flatnonzero(sizes + rest <= budget)
        order = keep[np.lexsort((losses[keep], sizes[keep]))]
        least = np.minimum.accumulate(losses[order])
        order = order[np.concatenate(([True], least[1:] < least[:-1]))]
        if len(order) > most:
            raise Invalid(f"an exact plan would hold more than {most:,} partial choices after {done + 1} modules: use lagrange or milp")
        size, loss = sizes[order], losses[order]
        trail.append((order // len(ladder.bytes), order % len(ladder.bytes)))
    return Front(menu, rungs, size, loss, trail)
