"""A plan as a problem of bit allocation, and back: its menu, its memory, what its start asks for, and the plan that a choice makes of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

from finebits import registry
from finebits.errors import Invalid
from finebits.plan import budget as budgets
from finebits.plan import cost, memory
from finebits.plan.allocation import Allocation, AllocationProblem
from finebits.plan.base import ENDS, Option, Plan, Spec, at_end
from finebits.plan.budget import Bits
from finebits.plan.footprint import Footprint
from finebits.plan.levers import Levers
from finebits.plan.planner import Menu, Planner
from finebits.stats.base import Statistic

DEFAULT = "lagrange"  # the planner of a plan that none has solved yet


def planner_of(plan: Plan) -> Planner:
    """The planner that a plan was made with; the default for one that none has solved yet.

    >>> planner_of(fb.Plan({})), planner_of(fb.Plan({}, solver={"planner": {"paper": "dp", "states": 1000}}))
    (Lagrange(), DP(states=1000))
    """
    entry = plan.solver.get("planner")
    if entry is None and "planner" in plan.solver:
        raise Invalid("this plan was made with a planner that finebits does not know: give it to again(plan, planner=…)")
    return registry.from_json("planners", entry or DEFAULT)


def is_known(planner: Planner) -> bool:
    """Can a plan name it, so that it is found again?

    >>> is_known(fb.Lagrange())
    True
    """
    return is_dataclass(planner) and type(planner).__module__.rpartition(".")[0] == "finebits.planners"


def menu_of(plan: Plan) -> dict[str, list[Option]]:
    """The menu that a plan was chosen from."""
    adapters = {int(rank): registry.from_json("adapters", a) for rank, a in plan.sizes.get("adapters", {}).items()}
    menu = {}
    for name, spec in plan.modules.items():
        costs = plan.costs.get(name, {})
        if not costs.get("menu"):
            raise Invalid(f"this plan does not hold what {name} could have been: plan again")
        *experts, m, n = costs["shape"]
        cells, specs = [], []
        for line in costs["menu"]:
            format = registry.from_json("formats", line["format"])
            init = registry.from_json("init", line["init"]) if "init" in line else spec.init
            candidate = replace(spec, format=format, init=init, adapter=adapters.get(line.get("rank"), spec.adapter))
            scales = 0 if format is None else math.prod(experts) * cost.overhead(format, m, n)
            numbers, codes = cost.numbers(candidate.adapter, m, n), cost.served_bytes(candidate, m, n)
            cells.append(cost.Cell(line["bytes"], scales, *numbers, line["loss"], codes))
            specs.append(candidate)
        menu[name] = cost.options(cells, specs)
        if "kurtosis" in costs:
            menu[name] = tailed(menu[name], costs["kurtosis"])
    return menu


def tailed(options: Sequence[Option], kurtosis: float) -> list[Option]:
    """Options that say how heavy the tails of their layer's weights are.

    >>> tailed([Option(fb.Spec(fb.NF(4)), 20, 1.0)], kurtosis=2.0)[0].more
    {'kurtosis': 2.0}
    """
    return [replace(o, more={**o.more, "kurtosis": kurtosis}) for o in options]


def problem_of(plan: Plan, menu: Menu, footprint: Footprint, planner: Planner, levers: Levers) -> AllocationProblem:
    """What is to be solved for a plan."""
    swept = statistics_of(plan, {name: [o.spec for o in options] for name, options in menu.items()})
    return AllocationProblem.of(menu, footprint, planner, levers, swept, {name: end for name in menu if (end := at_end(plan.costs[name]))})


def linear_shapes(plan: Plan) -> dict[str, list[int]]:
    """Shapes of the matrices that an average of bits is over."""
    return {name: plan.costs[name]["shape"] for name in plan.modules if at_end(plan.costs[name]) is None}


def in_counted_bits(plan: Plan, menu: Menu) -> Menu:
    """The menu with the bytes that an average of bits counts: of embeddings and a head none, of a dense matrix 16 bits, in whatever width it is
    held."""

    def own(name: str, o: Option) -> int:
        cost = plan.costs[name]
        return 0 if at_end(cost) else o.bytes if o.spec.format is not None else 2 * math.prod(cost["shape"])

    return {name: [replace(o, bytes=own(name, o)) for o in options] for name, options in menu.items()}


def at_most(menu: Menu, limit: int) -> int:
    """The limit, or all that a menu could take.

    >>> menu = {"a": [Option(fb.Spec(fb.NF(2)), 10, 5.0), Option(fb.Spec(fb.NF(4)), 20, 1.0)]}
    >>> at_most(menu, 15), at_most(menu, 1000)
    (15, 20)
    """
    return min(limit, sum(max(o.bytes for o in options) for options in menu.values()))


def room_of(plan: Plan, menu: Menu, planner: Planner) -> tuple[AllocationProblem, Menu, int]:
    """The menu with the bytes that the plan's budget counts, and how many of them there are under the plan's levers."""
    footprint, stated = Footprint.of(plan), budgets.read(plan.stated or None)
    problem = problem_of(plan, menu, footprint, planner, plan.levers)
    if isinstance(stated, Bits):
        costed = in_counted_bits(plan, menu)
        return problem, costed, at_most(costed, stated.bytes(list(linear_shapes(plan).values())))
    rates, rest = footprint.rates(menu, plan.levers)
    costed = footprint.costed(menu, rates)
    total = None if plan.budget is None else int(plan.budget * (1 - footprint.reserve))
    return problem, costed, problem.left(costed, rates, rest, plan.levers, total)


def explained(plan: Plan, menu: Menu, picked: Mapping[str, Option], planner: Planner) -> dict[str, Any]:
    """What the planner says of a choice."""
    _, costed, left = room_of(plan, menu, planner)
    beside = sum(costed[name][menu[name].index(o)].bytes - o.bytes for name, o in picked.items())  # adapters, where their ranks vary
    return planner.explained(menu, picked, left - beside)


def planned(plan: Plan, menu: Menu, allocation: Allocation, footprint: Footprint) -> Plan:
    """The plan with these bits and levers, and what it then takes."""
    held: dict[str | None, int] = dict.fromkeys((None, *ENDS), 0)
    for name, o in allocation.picked.items():
        held[at_end(plan.costs[name])] += o.bytes
    head = sum(max(o.bytes for o in menu[name]) for name in allocation.picked if at_end(plan.costs[name]) == "head")
    trained = footprint.chosen(allocation.picked)
    terms = memory.terms(footprint.geometry, held[None], trained, footprint.work(allocation.levers))
    costs = {name: plan.costs[name] | {"bytes": o.bytes, "loss": o.loss} for name, o in allocation.picked.items()}
    for name, o in allocation.picked.items():
        if any("rank" in line or "init" in line for line in costs[name]["menu"]):
            costs[name]["chosen"] = menu[name].index(o)
    swept = statistics_of(plan, {name: [o.spec] for name, o in allocation.picked.items()})
    rows = footprint.phases(sum(held.values()), head, allocation.levers, trained, swept)
    solved = replace(
        plan,
        modules={name: o.spec for name, o in allocation.picked.items()},
        memory=terms | {end: terms[end] + held[end] for end in ENDS},
        rows=rows,
        host={"embeddings": apart} if (apart := memory.hosted(footprint.geometry, allocation.levers)) else {},
        levers=allocation.levers,
        costs=costs,
    )
    return replace(solved, budget=footprint.budget(solved.need)) if isinstance(budgets.read(plan.stated or None), Bits) else solved


def statistics_of(plan: Plan, offered: Mapping[str, Sequence[Spec]]) -> memory.Swept | None:
    """The statistics of a start that runs the model, block by block; None where nothing asks for any. Where a matrix may be one of several
    specs, it asks for what all of them need."""
    specs = {
        name: several
        for name, several in offered.items()
        if len(plan.costs[name]["shape"]) == 2 and at_end(plan.costs[name]) != "embeddings"
    }
    wanted = {name: frozenset[type[Statistic]]().union(*(_needs(s) for s in v)) for name, v in specs.items()}
    refined = bool(plan.start.refine) and any(s.format for v in specs.values() for s in v)
    if not refined and not any(wanted.values()):
        return None
    shapes = {name: plan.costs[name]["shape"][-2:] for name in specs}
    sizes = {name: cost.statistics_bytes(statistics, *shapes[name]) for name, statistics in wanted.items()}
    scales = {name: max((cost.scales(s.format, *shapes[name]) for s in v if s.format), default=0) for name, v in specs.items()}
    most, backward = max(sizes.values(), default=0), any(S.backward for statistics in wanted.values() for S in statistics)
    return memory.Swept(_most(sizes), most, backward, _most(scales), sum(scales.values()))


def _needs(s: Spec) -> frozenset[type[Statistic]]:
    return s.quantizer.needs | s.init.needs | (frozenset() if s.adapter is None else s.adapter.needs)


def _most(sizes: Mapping[str, int]) -> int:
    """The largest sum over the modules of one block."""
    blocks = Counter[str]()
    for name, size in sizes.items():
        block = re.match(r".*?\.\d+\.", name)
        blocks[block[0] if block else name] += size
    return max(blocks.values(), default=0)
