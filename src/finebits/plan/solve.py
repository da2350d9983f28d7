"""Bits and levers chosen together: a priced menu, what a job takes beside it, and a budget give a plan; a plan gives another for another budget.

Every combination of the levers that may be pulled (`levers.variants`) is a budget for the bits; of the plans that lose at most 5 % more than the
best of them, the one whose levers slow training least is taken. Any planner chooses the bits, with its own side constraints and a second budget,
and solves again with them: a plan holds its planner.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from finebits import registry
from finebits.errors import Invalid
from finebits.plan import budget as budgets
from finebits.plan import kl_curve
from finebits.plan.allocation import Allocation, AllocationProblem, allocate
from finebits.plan.alternatives import alternatives, curve
from finebits.plan.base import Infeasible, Plan
from finebits.plan.budget import Bits, Share
from finebits.plan.cost import SERVED
from finebits.plan.footprint import Footprint
from finebits.plan.levers import CHANGED, Levers, optim_entry, read_optim
from finebits.plan.measured import predicted
from finebits.plan.planner import Menu, Planner
from finebits.plan.problem import (
    at_most,
    explained,
    in_counted_bits,
    is_known,
    linear_shapes,
    menu_of,
    planned,
    planner_of,
    problem_of,
)
from finebits.plan.refusal import infeasible
from finebits.plan.surplus import buys
from finebits.sizes import show


def solve(plan: Plan, menu: Menu | None = None, planner: Planner | None = None, pareto: int = 0) -> Plan:
    """`plan` solved: bits and levers for its budgets, out of `menu` (its own if None), with alternatives and a Pareto curve beside them.

    `plan.levers` are the levers as they were asked for. Raises Infeasible, which names the smallest budget and what could be given up.
    """
    menu, planner, footprint = menu or menu_of(plan), planner or planner_of(plan), Footprint.of(plan)
    asked = plan.levers
    stated = budgets.read(plan.stated or None)
    problem = problem_of(plan, menu, footprint, planner, asked)
    _servable(menu, footprint, asked)
    shared: dict[str, Any] = {}
    if isinstance(stated, Share):
        shared = {"share_of": (of := _everywhere(plan, problem, stated, asked))}
        plan = replace(plan, budget=footprint.budget(math.ceil(stated.share * of)))
    name = type(problem.planner).__module__.rsplit(".", 1)[-1]
    total = None if plan.budget is None else int(plan.budget * (1 - footprint.reserve))
    if isinstance(stated, Bits):
        allocation = _of_bits(plan, problem, stated, asked)
        facts: dict[str, Any] = {"name": name} | _gap(allocation)
    elif total is None and footprint.serve is None and problem.planner.minimises:
        allocation = Allocation({k: min(v, key=lambda o: (o.loss, o.bytes)) for k, v in menu.items()}, asked, 0.0)
        facts = {"name": "unbounded", "bound": None, "gap": 0.0}
    else:
        best = allocate(problem, total, asked, footprint.pulls if total is not None else ())
        if best is None:
            raise infeasible(problem, plan, asked)
        allocation = best
        facts = {"name": name} | _gap(allocation)
    solved = planned(plan, menu, allocation, footprint)
    facts = (
        plan.solver
        | facts
        | shared
        | {"loss": sum(o.loss for o in allocation.picked.values())}
        | {"asked": {k: getattr(asked, k) for k in CHANGED} | {"optim": optim_entry(asked)}}
    )
    facts["planner"] = registry.to_json(planner) if is_known(planner) else None
    if planner.tunes_blocks:
        facts["blocks"] = explained(solved, menu, allocation.picked, planner)
    if footprint.serve is not None:
        saved = footprint.served_beside(asked) + int(sum(o.more["serve"] for o in allocation.picked.values()))
        facts["serve"] = {"budget": footprint.serve, "planned": saved}
        facts["serve"] |= {"pool": footprint.pool._asdict() | {"bytes": footprint.pool.bytes}} if footprint.pool else {}
    facts["alternatives"] = alternatives(solved, problem, allocation, asked)
    facts["buys"] = [] if isinstance(stated, Bits) else buys(solved, problem, allocation, asked)
    facts["pareto"] = curve(problem, allocation.levers, pareto) if pareto else []
    solved = replace(solved, solver=facts)
    return predicted(solved, [kl_curve.Point(v["loss"], v["kl"], v["error"]) for v in facts["kl"]["variants"]]) if "kl" in facts else solved


def _gap(allocation: Allocation) -> dict[str, float]:
    loss = sum(o.loss for o in allocation.picked.values())
    return {"bound": allocation.bound, "gap": max(loss - allocation.bound, 0.0) / allocation.bound if allocation.bound > 0 else 0.0}


def _everywhere(plan: Plan, problem: AllocationProblem, stated: Share, levers: Levers) -> int:
    """What the job takes with one format for all matrices and the levers as they were asked for; of ranks on offer, the largest."""
    footprint, menu = problem.footprint, problem.menu
    trained = footprint.trained
    if footprint.varied:
        most = {k: sum(int(max(o.more[k] for o in options)) for options in menu.values()) for k in ("trained", "frozen")}
        trained = footprint.with_options(**most, rank=footprint.trained.rank)
    weights = stated.bytes(list(linear_shapes(plan).values())) + sum(max(o.bytes for o in menu[name]) for name in problem.ends)
    return max(weights + footprint.rest(levers, trained), *problem.phases(weights, levers, trained).values())


def _of_bits(plan: Plan, problem: AllocationProblem, stated: Bits, levers: Levers) -> Allocation:
    """The best choice of so many bits on average, whatever else it takes."""
    if problem.footprint.serve is not None:
        raise Invalid(f"a budget of {plan.stated} bounds what is saved as well: leave the serve budget out, or state the budget in bytes")
    costed, shapes = in_counted_bits(plan, problem.menu), list(linear_shapes(plan).values())
    try:
        solution = problem.planner(costed, at_most(costed, stated.bytes(shapes)))
    except Infeasible as e:
        if not e.for_bytes:
            raise
        least = math.ceil(800 * e.smallest / sum(map(math.prod, shapes))) / 100
        message = f"Does not fit: the smallest plan has {least:.2f} bits a linear weight, the budget is {plan.stated}."
        raise Infeasible(message, e.smallest, f'Write budget.memory="{least:.2f} bits", or offer formats of fewer bits.') from None
    return Allocation(problem.own(costed, solution), levers, solution.bound)


def _servable(menu: Menu, footprint: Footprint, levers: Levers) -> None:
    """Raise Infeasible where even the smallest options exceed the serve budget."""
    if footprint.serve is None:
        return
    apart, pool = footprint.served_beside(levers), footprint.pool
    least = apart + int(sum(min(o.more["serve"] for o in options) for options in menu.values()))
    if least > footprint.serve:
        beside = show(footprint.saved_beside(levers) + SERVED * footprint.trained.again)
        what, those, less = "the smallest model that can be saved takes", "", ""
        if pool is not None:
            what = "the smallest model that can be saved and the pages that it is served with take"
            those = f", {show(pool.bytes)} pages of {pool.adapters} adapters and {pool.tokens:,} tokens"
            less = ", lower budget.serve_adapters or budget.serve_tokens"
        raise Infeasible(
            f"Does not fit: {what} {show(least)}, the serve budget is {show(footprint.serve)}.",
            least,
            f"Of these, {beside} are embeddings, head and norms{those}. Raise --serve-budget{less}, or offer formats of fewer bits.",
        )


def again(plan: Plan, budget: int | str | None = None, planner: Planner | None = None, pareto: int = 0, **levers: Any) -> Plan:
    """The plan for another budget, stated as in a recipe, or other levers, out of the same menu by the same planner: nothing is read or priced
    again."""
    plan = plan if budget is None else with_budget(plan, budget)
    return solve(replace(plan, levers=replace(asked_of(plan), **levers)), planner=planner, pareto=pareto)


def with_budget(plan: Plan, stated: int | str | float | None) -> Plan:
    """The plan with a budget as people state it, not solved yet.

    >>> with_budget(fb.Plan({}), "400MiB").budget, with_budget(fb.Plan({}), "3.1 bits").stated
    (419430400, '3.1 bits')
    """
    read = stated if isinstance(stated, int) else budgets.read(stated)
    return replace(plan, budget=read, stated="") if isinstance(read, int | None) else replace(plan, budget=None, stated=str(stated))


def asked_of(plan: Plan) -> Levers:
    """The levers as they were before any was pulled.

    >>> asked_of(fb.Plan({}, levers=fb.Levers(loss_chunk=64), solver={"asked": {"loss_chunk": 256}})).loss_chunk
    256
    """
    return replace(plan.levers, **read_optim({k: v for k, v in plan.solver.get("asked", {}).items() if v is not None}))
