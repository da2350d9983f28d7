"""Bits and levers for one limit in bytes, which holds for every phase of the job: training, and what comes before and after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finebits import registry
from finebits.plan.base import Infeasible, Option
from finebits.plan.footprint import Footprint, Rates
from finebits.plan.knapsack import dual_bound, smallest
from finebits.plan.levers import Levers, variants
from finebits.plan.memory import Swept, Trained
from finebits.plan.planner import Menu, Planner, Solution

NEAR = 1.05  # a plan that loses this much more is as good, if its levers cost less time


class Allocation(NamedTuple):
    """A choice, its levers, and a bound below which no choice with these levers can lose."""

    picked: dict[str, Option]
    levers: Levers
    bound: float


@dataclass(frozen=True)
class AllocationProblem:
    """A menu, what the job takes beside it, who chooses; what statistics a start out of this menu asks for at most, and which of it are
    ends of the model (`plan.base.ENDS`)."""

    menu: Menu
    footprint: Footprint
    planner: Planner
    swept: Swept | None
    ends: Mapping[str, str]

    @classmethod
    def of(
        cls,
        menu: Menu,
        footprint: Footprint,
        planner: Planner,
        levers: Levers,
        swept: Swept | None,
        ends: Mapping[str, str],
    ) -> AllocationProblem:
        """Where ranks vary, bytes of training and of the saved model are two sums, and not every planner keeps to both."""
        if footprint.serve is not None and footprint.varied:
            keeper: Any = planner if "serve" in planner.honours else registry.load("planners", planner.deputy)()
            planner = replace(keeper, serve=footprint.serve - footprint.served_beside(levers))
        return cls(menu, footprint, planner, swept, ends)

    def phases(self, weights: int, levers: Levers, trained: Trained) -> dict[str, int]:
        """Peaks of the phases beside training that the recipe does not leave out, with so many bytes of weights."""
        head = sum(max(o.bytes for o in self.menu[name]) for name, end in self.ends.items() if end == "head")
        return self.footprint.phases(weights, head, levers, trained, self.swept)

    def needs(self, picked: Mapping[str, Option], levers: Levers) -> dict[str, int]:
        """Peaks of all phases, training first, of a choice."""
        weights = sum(o.bytes for o in picked.values())
        return {"training": self.footprint.peak(picked, levers)} | self.phases(weights, levers, self.footprint.chosen(picked))

    def room(self, levers: Levers, total: int) -> int:
        """The bytes of weights that all phases beside training leave within `total`, ranks at their least; negative where there are none.

        A phase is the largest of moments that are affine in the weights, so a convex function, which its chord never lies below.
        """
        most = sum(max(o.bytes for o in options) for options in self.menu.values())
        trained = self.footprint.least_trained(self.menu)
        low, high = (self.phases(weights, levers, trained) for weights in (0, most))
        rooms = [most]
        for phase, at_most in high.items():
            if at_most > total:
                slope = (at_most - low[phase]) / most
                rooms.append(math.floor((total - low[phase]) / slope) if slope else -1)
        return min(rooms)

    def cap(self, levers: Levers) -> int | None:
        """What a second budget leaves for the menu's bytes, where that is the same sum but for what is fixed."""
        if self.footprint.serve is None or self.footprint.varied:
            return None
        fixed = int(sum(options[0].more["serve"] - options[0].bytes for options in self.menu.values()))
        return self.footprint.serve - self.footprint.served_beside(levers) - fixed

    def left(self, costed: Menu, rates: Rates, rest: int, levers: Levers, total: int | None) -> int:
        """What a limit of `total` on all phases, and a second budget, leave for the bytes of `costed`, the menu at these rates."""
        limits = [sum(max(o.bytes for o in options) for options in costed.values()), self.cap(levers)]
        if total is not None:
            room = self.room(levers, total)
            limits += [total - rest] + ([room] if not self.footprint.varied or room < smallest(self.menu) else [])
        return min(v for v in limits if v is not None)

    def own(self, costed: Menu, picked: dict[str, Option]) -> dict[str, Option]:
        """A choice of `costed` in the menu's own options."""
        return picked if costed is self.menu else {name: self.menu[name][costed[name].index(o)] for name, o in picked.items()}


def allocate(problem: AllocationProblem, total: int | None, levers: Levers, pulls: Sequence[str]) -> Allocation | None:
    """The choice and the levers with which no phase takes more than `total` bytes (None: no limit); None if no combination fits.

    Where ranks vary, what the phases around training take follows the ranks that are chosen: a choice that breaks one is made again with so
    many bytes less.
    """
    spare = 0
    while True:
        allocation = _allocate(problem, total, levers, pulls, spare)
        if allocation is None or total is None:
            return allocation
        over = max(problem.needs(allocation.picked, allocation.levers).values()) - total
        if over <= 0:
            return allocation
        spare += over


def _allocate(problem: AllocationProblem, total: int | None, levers: Levers, pulls: Sequence[str], spare: int) -> Allocation | None:
    """More bytes never lose more, so the best loss is that of the roomiest combinations; the others are tried from the fastest on, and those
    that a bound or a failure with more bytes rules out are passed over."""
    footprint, menus, tries = problem.footprint, dict[Rates, Menu](), list[tuple[Levers, Rates, int]]()
    for _, changed in sorted(variants(levers, pulls), key=lambda v: v[0]):
        rates, rest = footprint.rates(problem.menu, changed)
        if rates not in menus:
            menus[rates] = footprint.costed(problem.menu, rates)
        left = problem.left(menus[rates], rates, rest, changed, total) - spare
        if left >= smallest(menus[rates]):
            tries.append((changed, rates, left))
    solved: dict[tuple[Rates, int], Solution | None] = {}

    def at(rates: Rates, left: int) -> Solution | None:
        if (rates, left) not in solved:
            try:
                solved[rates, left] = problem.planner(menus[rates], left)
            except Infeasible as e:
                if not e.for_bytes:
                    raise
                solved[rates, left] = None
        return solved[rates, left]

    def within(one: tuple[Levers, Rates, int], other: tuple[Levers, Rates, int]) -> bool:
        """Has `one` no more room than `other`?"""
        return one[2] <= other[2] and all(a >= b for a, b in zip(one[1], other[1], strict=True))

    best, roomiest = math.inf, list[tuple[Levers, Rates, int]]()
    for t in sorted(tries, key=lambda t: -t[2]):
        if not any(within(t, r) for r in roomiest):
            roomiest.append(t)
            solution = at(t[1], t[2])
            best = best if solution is None else min(best, solution.loss)
    failed: list[tuple[Levers, Rates, int]] = []
    for t in tries:
        if any(within(t, f) for f in failed):
            continue
        limit = best * NEAR + 1e-12
        solution = None if dual_bound(menus[t[1]], t[2]) > limit else at(t[1], t[2])
        if solution is None or solution.loss > limit:
            failed.append(t)
        else:
            return Allocation(problem.own(menus[t[1]], solution), t[0], solution.bound)
    return None
