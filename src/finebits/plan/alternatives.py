"""What else there is beside a plan: one format everywhere, all levers pulled, a lighter one, and every budget's best."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from finebits.plan import budget as budgets
from finebits.plan.allocation import Allocation, AllocationProblem, allocate
from finebits.plan.base import Infeasible, Option, Plan, at_end
from finebits.plan.budget import Bits
from finebits.plan.knapsack import shared_specs, smallest
from finebits.plan.levers import PULLS, Levers, in_words
from finebits.plan.planner import Menu

LIGHTER = 0.9  # of what the chosen plan takes: the lighter alternative
POINTS = 24  # of a Pareto curve


def _width(option: Option) -> int:
    return 16 if option.spec.format is None else option.spec.format.bits


def uniform(menu: Menu, bits: int, adapted: Collection[str]) -> dict[str, Option] | None:
    """One candidate of `bits` bits for all `adapted` modules, the one that loses least. A module without a choice of formats or without such a
    one, as a fixed one, keeps its best, as do all others. None if those left share no such candidate.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 5.0), fb.Option(many, 20, 1.0)], "b": [fb.Option(few, 10, 3.0), fb.Option(many, 20, 2.5)]}
    >>> {name: o.bytes for name, o in uniform(menu, 4, {"a", "b"}).items()}, uniform(menu, 8, {"a", "b"})
    ({'a': 20, 'b': 20}, None)
    """
    several = {k: v for k, v in menu.items() if k in adapted and len({o.spec.format for o in v}) > 1}
    free = {k: v for k, v in several.items() if any(_width(o) == bits for o in v)}
    at = {k: dict(zip(specs, free[k], strict=True)) for k, specs in shared_specs(free).items()}
    shared = set[Any].intersection(*({s for s, o in v.items() if _width(o) == bits} for v in at.values())) if free else set()
    best = {k: min(v, key=lambda o: (o.loss, o.bytes)) for k, v in menu.items() if k not in free}
    candidates = []
    for spec in shared:
        picked = {k: best[k] if k in best else at[k][spec] for k in menu}
        candidates.append((sum(o.loss for o in picked.values()), sum(o.bytes for o in picked.values()), picked))
    return min(candidates, key=lambda m: m[:2])[2] if candidates else None


def alternatives(plan: Plan, problem: AllocationProblem, chosen: Allocation, asked: Levers) -> list[dict[str, Any]]:
    """What else there is, most memory first: one format everywhere, with the levers as asked and as chosen; the chosen plan, if it is none of
    these; all levers pulled, where they may not be; a lighter plan. `over` is what a row takes beyond the budget, None where there is none, and
    `saved` what it takes beyond a serve budget."""
    menu, footprint = problem.menu, problem.footprint
    total = None if plan.budget is None else int(plan.budget * (1 - footprint.reserve))
    linear = [name for name in menu if at_end(plan.costs[name]) is None]
    adapted = frozenset(name for name in linear if len(plan.costs[name]["shape"]) == 2)
    weights = sum(math.prod(plan.costs[name]["shape"]) for name in linear)
    rows: list[dict[str, Any]] = []

    def kind(picked: Mapping[str, Option], levers: Levers) -> Any:
        return {k: o.spec for k, o in picked.items()}, in_words(levers)

    def add(name: str, picked: Mapping[str, Option], levers: Levers) -> None:
        needs = problem.needs(picked, levers)
        largest = max(needs, key=lambda phase: needs[phase])
        row: dict[str, Any] = {
            "name": name,
            "bits": 8 * sum(picked[k].bytes for k in linear) / weights,
            "peak": needs["training"],
            "loss": sum(o.loss for o in picked.values()),
        }
        if footprint.serve is not None:
            saved = footprint.served_beside(levers) + int(sum(o.more["serve"] for o in picked.values()))
            row["saved"] = max(saved - footprint.serve, 0)
        row |= {
            "over": None if total is None else max(needs[largest] - total, 0),
            "chosen": kind(picked, levers) == own,
            "levers": in_words(levers),
        }
        rows.append(row | ({"breaks": largest} if row["over"] and largest != "training" else {}))

    own = kind(chosen.picked, chosen.levers)
    pulled = chosen.levers if in_words(chosen.levers) != in_words(asked) else None
    for bits in sorted({_width(o) for options in menu.values() for o in options if o.spec.format is not None}, reverse=True):
        picked = uniform(menu, bits, adapted)
        if picked is not None:
            add(f"{bits} bits everywhere", picked, asked)
            if pulled is not None:
                add(f"{bits} bits everywhere, levers pulled", picked, pulled)
    if not any(row["chosen"] for row in rows):
        add("mixed" + (", levers pulled" if pulled is not None else ""), chosen.picked, chosen.levers)
    if total is not None and not isinstance(budgets.read(plan.stated or None), Bits):
        all_pulled = allocate(problem, total, asked, PULLS) if set(footprint.pulls) != set(PULLS) else None
        if all_pulled is not None and in_words(all_pulled.levers) != in_words(chosen.levers):
            add("mixed, all levers", all_pulled.picked, all_pulled.levers)
        light = allocate(problem, int(plan.need * LIGHTER), asked, footprint.pulls)
        if light is not None:
            add("mixed, lighter", light.picked, light.levers)
    return sorted(rows, key=lambda r: (-r["peak"], r["loss"]))


def curve(problem: AllocationProblem, levers: Levers, count: int = POINTS) -> list[dict[str, Any]]:
    """What each of `count` budgets, evenly spaced from the smallest choice to the largest, would lose with these levers; those that side
    constraints leave nothing for are left out."""
    rates, _ = problem.footprint.rates(problem.menu, levers)
    costed, cap = problem.footprint.costed(problem.menu, rates), problem.cap(levers)
    low, high = smallest(costed), sum(max(o.bytes for o in options) for options in costed.values())
    high = high if cap is None else min(high, cap)
    points: dict[int, float] = {}
    for i in range(count):
        try:
            picked = problem.own(costed, problem.planner(costed, low + (high - low) * i // max(count - 1, 1)))
        except Infeasible:
            continue
        points[problem.footprint.peak(picked, levers)] = sum(o.loss for o in picked.values())
    return [{"peak": peak, "loss": loss} for peak, loss in sorted(points.items())]
