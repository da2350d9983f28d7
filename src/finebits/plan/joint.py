"""Bits and levers for one limit in bytes, which holds for every phase of the job: training, and what comes before and after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finebits.plan.around import Around, Levers, Rates, variants
from finebits.plan.base import Infeasible, Option, Planner
from finebits.plan.knapsack import Menu, dual_bound, smallest
from finebits.plan.memory import Trained
from finebits.planners.block_size import BlockSize
from finebits.planners.milp import MILP

NEAR = 1.05  # a plan that loses this much more is as good, if its levers cost less time


class Found(NamedTuple):
    """A choice, its levers, and a bound below which no choice with these levers can lose."""

    picked: dict[str, Option]
    levers: Levers
    bound: float


@dataclass(frozen=True)
class Problem:
    """A menu, what is around it, who chooses; the statistics that a start out of this menu asks for at most, and the names of heads in it."""

    menu: Menu
    around: Around
    planner: Planner
    seen: Any
    heads: frozenset[str]

    @classmethod
    def of(
        cls,
        menu: Menu,
        around: Around,
        planner: Planner,
        levers: Levers,
        seen: Any,
        heads: frozenset[str],
    ) -> Problem:
        """Where ranks vary, bytes of training and of the saved model are two sums, which is a matter for the integer program."""
        if around.serve is not None and around.varied:
            given = planner if isinstance(planner, MILP) else MILP()
            planner = replace(given, serve=around.serve - around.apart(levers))
        return cls(menu, around, planner, seen, heads)

    def phases(self, weights: int, levers: Mapping[str, Any], trained: Trained) -> dict[str, int]:
        """Peaks of the phases beside training that the recipe does not leave out, with so many bytes of weights."""
        head = sum(max(o.bytes for o in self.menu[name]) for name in self.heads)
        return self.around.phases(weights, head, levers, trained, self.seen)

    def needs(self, picked: Mapping[str, Option], levers: Mapping[str, Any]) -> dict[str, int]:
        """Peaks of all phases, training first, of a choice."""
        weights = sum(o.bytes for o in picked.values())
        return {"training": self.around.peak(picked, levers)} | self.phases(weights, levers, self.around.chosen(picked))

    def room(self, levers: Levers, total: int) -> int:
        """The bytes of weights that all phases beside training leave within `total`, ranks at their least; negative where there are none.

        A phase is the largest of moments that are affine in the weights, so a convex function, which its chord never lies below.
        """
        most = sum(max(o.bytes for o in options) for options in self.menu.values())
        trained = self.around.least_trained(self.menu)
        low, high = (self.phases(weights, levers, trained) for weights in (0, most))
        rooms = [most]
        for phase, at_most in high.items():
            if at_most > total:
                slope = (at_most - low[phase]) / most
                rooms.append(math.floor((total - low[phase]) / slope) if slope else -1)
        return min(rooms)

    def cap(self, levers: Levers) -> int | None:
        """What a second budget leaves for the menu's bytes, where that is the same sum but for what is fixed."""
        if self.around.serve is None or self.around.varied:
            return None
        fixed = int(sum(options[0].more["serve"] - options[0].bytes for options in self.menu.values()))
        return self.around.serve - self.around.apart(levers) - fixed

    def left(self, held: Menu, rates: Rates, rest: int, levers: Levers, total: int | None) -> int:
        """What a limit of `total` on all phases, and a second budget, leave for the bytes of `held`, the menu at these rates."""
        limits = [sum(max(o.bytes for o in options) for options in held.values()), self.cap(levers)]
        if total is not None:
            room = self.room(levers, total)
            limits += [total - rest] + ([room] if not self.around.varied or room < smallest(self.menu) else [])
        return min(v for v in limits if v is not None)

    def solve(self, menu: Menu, left: int) -> tuple[dict[str, Option], float]:
        """The planner's choice within `left` bytes, and a bound of its loss."""
        if isinstance(self.planner, MILP):
            found = self.planner.solve(menu, left)
            return found.choice, found.bound
        if isinstance(self.planner, BlockSize):
            return self.planner(menu, left), dual_bound(*self.planner.within(menu, left))
        return self.planner(menu, left), dual_bound(menu, left)

    def own(self, held: Menu, picked: Mapping[str, Option]) -> dict[str, Option]:
        """A choice of `held` in the menu's own options."""
        return picked if held is self.menu else {name: self.menu[name][held[name].index(o)] for name, o in picked.items()}  # type: ignore[return-value]


def joint(problem: Problem, total: int | None, levers: Levers, pulls: Sequence[str]) -> Found | None:
    """The choice and the levers with which no phase takes more than `total` bytes (None: no limit); None if no combination fits.

    Where ranks vary, what the phases around training take follows the ranks that are chosen: a choice that breaks one is made again with so
    many bytes less.
    """
    spare = 0
    while True:
        found = _joint(problem, total, levers, pulls, spare)
        if found is None or total is None:
            return found
        over = max(problem.needs(found.picked, found.levers).values()) - total
        if over <= 0:
            return found
        spare += over


def _joint(problem: Problem, total: int | None, levers: Levers, pulls: Sequence[str], spare: int) -> Found | None:
    """More bytes never lose more, so the best loss is that of the roomiest combinations; the others are tried from the fastest on, and those
    that a bound or a failure with more bytes rules out are passed over."""
    around, menus, tries = problem.around, dict[Rates, Menu](), list[tuple[Levers, Rates, int]]()
    for _, changed in sorted(variants(levers, pulls), key=lambda v: v[0]):
        rates, rest = around.rates(problem.menu, changed)
        if rates not in menus:
            menus[rates] = around.held(problem.menu, rates)
        left = problem.left(menus[rates], rates, rest, changed, total) - spare
        if left >= smallest(menus[rates]):
            tries.append((changed, rates, left))
    solved: dict[tuple[Rates, int], tuple[dict[str, Option], float, float] | None] = {}

    def at(rates: Rates, left: int) -> tuple[dict[str, Option], float, float] | None:
        if (rates, left) not in solved:
            try:
                picked, bound = problem.solve(menus[rates], left)
            except Infeasible as e:
                if type(e) is not Infeasible:  # no lack of bytes
                    raise
                solved[rates, left] = None
            else:
                solved[rates, left] = picked, sum(o.loss for o in picked.values()), bound
        return solved[rates, left]

    def within(one: tuple[Levers, Rates, int], other: tuple[Levers, Rates, int]) -> bool:
        """Has `one` no more room than `other`?"""
        return one[2] <= other[2] and all(a >= b for a, b in zip(one[1], other[1], strict=True))

    best, roomiest = math.inf, list[tuple[Levers, Rates, int]]()
    for t in sorted(tries, key=lambda t: -t[2]):
        if not any(within(t, r) for r in roomiest):
            roomiest.append(t)
            made = at(t[1], t[2])
            best = min(best, made[1]) if made else best
    failed: list[tuple[Levers, Rates, int]] = []
    for t in tries:
        if any(within(t, f) for f in failed):
            continue
        limit = best * NEAR + 1e-12
        made = None if dual_bound(menus[t[1]], t[2]) > limit else at(t[1], t[2])
        if made is None or made[1] > limit:
            failed.append(t)
        else:
            return Found(problem.own(menus[t[1]], made[0]), t[0], made[2])
    return None
