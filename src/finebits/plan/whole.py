"""Bits and levers chosen together: a priced menu, what is around it, and a budget give a plan; a plan gives another for another budget.

Every combination of the levers that may be pulled (`around`) is a budget for the bits; of the plans that lose at most 5 % more than the best of
them, the one whose levers slow training least is taken. Any planner chooses the bits, with its own side constraints and a second budget, and
solves again with them: a plan holds its planner.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

from finebits import registry
from finebits.errors import Invalid
from finebits.plan import budget as budgets
from finebits.plan import cost, kl_curve, memory
from finebits.plan.advice import buys, infeasible
from finebits.plan.around import CHANGED, PULLS, Around, Levers, said
from finebits.plan.base import Infeasible, Option, Plan, Planner, Spec
from finebits.plan.budget import Bits, Share
from finebits.plan.joint import Found, Problem, joint
from finebits.plan.knapsack import Menu, shared_specs, smallest
from finebits.plan.memory import Trained
from finebits.planners.block_size import BlockSize, report
from finebits.planners.dp import DP
from finebits.planners.lagrange import Lagrange
from finebits.planners.lq_lora_ilp import LQLoRAILP
from finebits.sizes import show
from finebits.stats.base import Statistic

SATURATIONS = (0.0, 1.0, 3.0, 10.0)
LIGHTER = 0.9  # of what the chosen plan takes: the lighter alternative
POINTS = 24  # of a Pareto curve


def whole(plan: Plan, menu: Menu | None = None, planner: Planner | None = None, pareto: int = 0) -> Plan:
    """`plan` solved: bits and levers for its budgets, out of `menu` (its own if None), with alternatives and a Pareto curve beside them.

    `plan.levers` are the levers as they were asked for. Raises Infeasible, which names the smallest budget and what could be given up.
    """
    menu, planner, around = menu or menu_of(plan), planner or planner_of(plan), Around.of(plan)
    asked = {"embeddings": "device"} | plan.levers  # what a plan by hand need not say
    stated = budgets.read(plan.stated or None)
    problem = _problem(plan, menu, around, planner, asked)
    _servable(menu, around, asked)
    shared: dict[str, Any] = {}
    if isinstance(stated, Share):
        shared = {"share_of": (of := _everywhere(plan, problem, stated, asked))}
        plan = replace(plan, budget=around.budget(math.ceil(stated.share * of)))
    name = type(problem.planner).__module__.rsplit(".", 1)[-1]
    total = None if plan.budget is None else int(plan.budget * (1 - around.reserve))
    if isinstance(stated, Bits):
        found = _of_bits(plan, problem, stated, asked)
        facts: dict[str, Any] = {"name": name} | _gap(found)
    elif total is None and around.serve is None and isinstance(problem.planner, Lagrange | DP | LQLoRAILP):
        found = Found({k: min(v, key=lambda o: (o.loss, o.bytes)) for k, v in menu.items()}, asked, 0.0)
        facts = {"name": "unbounded", "bound": None, "gap": 0.0}
    else:
        best = joint(problem, total, asked, around.pulls if total is not None else ())
        if best is None:
            raise infeasible(problem, plan, asked)
        found = best
        facts = {"name": name} | _gap(found)
    made = _with(plan, menu, found, around)
    facts = plan.solver | facts | shared | {"loss": sum(o.loss for o in found.picked.values()), "asked": {k: asked.get(k) for k in CHANGED}}
    facts["planner"] = registry.to_json(planner) if _known(planner) else None
    if isinstance(planner, BlockSize):
        facts["blocks"] = _blocks(made, menu, found.picked, planner)
    if around.serve is not None:
        saved = around.apart(asked) + int(sum(o.more["serve"] for o in found.picked.values()))
        facts["serve"] = {"budget": around.serve, "planned": saved}
    facts["alternatives"] = alternatives(made, problem, found, asked)
    facts["buys"] = [] if isinstance(stated, Bits) else buys(made, problem, found, asked)
    facts["pareto"] = curve(problem, found.levers, pareto) if pareto else []
    made = replace(made, solver=facts)
    return predicted(made, [kl_curve.Point(v["loss"], v["kl"], v["error"]) for v in facts["kl"]["variants"]]) if "kl" in facts else made


def _blocks(plan: Plan, menu: Menu, picked: Mapping[str, Option], planner: Planner) -> dict[str, Any]:
    assert isinstance(planner, BlockSize)
    _, held, left = _room(plan, menu, planner)
    beside = sum(held[name][menu[name].index(o)].bytes - o.bytes for name, o in picked.items())  # adapters, where their ranks vary
    return report(menu, picked, planner, left - beside)


def _gap(found: Found) -> dict[str, float]:
    loss = sum(o.loss for o in found.picked.values())
    return {"bound": found.bound, "gap": max(loss - found.bound, 0.0) / found.bound if found.bound > 0 else 0.0}


def _problem(plan: Plan, menu: Menu, around: Around, planner: Planner, levers: Levers) -> Problem:
    seen = _seen(plan, {name: [o.spec for o in options] for name, options in menu.items()}, levers)
    return Problem.of(menu, around, planner, levers, seen, frozenset(name for name in menu if plan.costs[name].get("head")))


def _linear(plan: Plan) -> dict[str, list[int]]:
    """Shapes of the matrices that an average of bits is over."""
    return {name: plan.costs[name]["shape"] for name in plan.modules if not plan.costs[name].get("head")}


def _everywhere(plan: Plan, problem: Problem, stated: Share, levers: Levers) -> int:
    """What the job takes with one format for all matrices and the levers as they were asked for; of ranks on offer, the largest."""
    around, menu = problem.around, problem.menu
    trained = around.trained
    if around.varied:
        most = {k: sum(int(max(o.more[k] for o in options)) for options in menu.values()) for k in ("trained", "frozen")}
        trained = Trained(**most, rank=around.trained.rank)
    weights = stated.bytes(list(_linear(plan).values())) + sum(max(o.bytes for o in menu[name]) for name in problem.heads)
    return max(weights + around.rest(levers, trained), *problem.phases(weights, levers, trained).values())


def _counted(plan: Plan, menu: Menu) -> Menu:
    """The menu with the bytes that an average of bits counts: of a head none, of a dense matrix 16 bits, in whatever width it is held."""

    def own(name: str, o: Option) -> int:
        cost = plan.costs[name]
        return 0 if cost.get("head") else o.bytes if o.spec.format is not None else 2 * math.prod(cost["shape"])

    return {name: [replace(o, bytes=own(name, o)) for o in options] for name, options in menu.items()}


def _of_bits(plan: Plan, problem: Problem, stated: Bits, levers: Levers) -> Found:
    """The best choice of so many bits on average, whatever else it takes."""
    if problem.around.serve is not None:
        raise Invalid(f"a budget of {plan.stated} bounds what is saved as well: leave the serve budget out, or state the budget in bytes")
    held, shapes = _counted(plan, problem.menu), list(_linear(plan).values())
    try:
        picked, bound = problem.solve(held, _left(held, stated.bytes(shapes)))
    except Infeasible as e:
        if type(e) is not Infeasible:
            raise
        least = math.ceil(800 * e.smallest / sum(map(math.prod, shapes))) / 100
        message = f"Does not fit: the smallest plan has {least:.2f} bits a linear weight, the budget is {plan.stated}."
        raise Infeasible(message, e.smallest, f'Write budget.memory="{least:.2f} bits", or offer formats of fewer bits.') from None
    return Found(problem.own(held, picked), levers, bound)


def _left(held: Menu, limit: int) -> int:
    return min(limit, sum(max(o.bytes for o in options) for options in held.values()))


def predicted(plan: Plan, points: Sequence[kl_curve.Point]) -> Plan:
    """The plan with the interval of its KL, and of its Pareto curve's, as variants that were really measured say."""
    fitted = kl_curve.fit(points)
    seen = [{"loss": p.predicted, "kl": p.measured, "error": p.error} for p in points]
    kl = {"interval": list(fitted(plan.solver["loss"])), "share": kl_curve.SHARE, "variants": seen}
    pareto = [p | {"kl": list(fitted(p["loss"]))} for p in plan.solver["pareto"]]
    return replace(plan, solver=plan.solver | {"kl": kl, "pareto": pareto})


def saturated(menu: Menu, choose: Callable[[Menu], Mapping[str, Option]]) -> list[dict[str, Option]]:
    """The choices with the least Σ log(1 + κ·loss) / κ, one for each κ in SATURATIONS.

    κ = 0 is the plain sum; with a larger κ a matrix that is lost already cannot lose much more, which is what a sum of second-order
    estimates does not know where the KL is above one.
    """
    found = []
    for k in SATURATIONS:
        bent = {name: [replace(o, loss=math.log1p(k * o.loss) / k) if k else o for o in options] for name, options in menu.items()}
        picked = choose(bent)
        found.append({name: menu[name][next(i for i, o in enumerate(bent[name]) if o is picked[name])] for name in menu})
    return found


def contenders(plan: Plan, menu: Menu, planner: Planner | None = None) -> list[dict[str, Option]]:
    """`saturated` choices for the plan's budgets under the plan's levers."""
    problem, held, left = _room(plan, menu, planner or planner_of(plan))
    return [problem.own(held, picked) for picked in saturated(held, lambda m: problem.solve(m, left)[0])]


def neighbours(plan: Plan, menu: Menu, planner: BlockSize) -> dict[str, dict[str, Option]]:
    """What lies around a plan of blocks, by name, those that hold least first."""
    problem, held, left = _room(plan, menu, planner)
    optimum = {name: next(o for o in options if o.spec == plan.modules[name]) for name, options in held.items()}
    found = {said: problem.own(held, picked) for said, picked in planner.around(held, left, optimum)}
    return dict(sorted(found.items(), key=lambda f: sum(o.bytes for o in f[1].values())))


def _room(plan: Plan, menu: Menu, planner: Planner) -> tuple[Problem, Menu, int]:
    """The menu with the bytes that the plan's budget counts, and how many of them there are under the plan's levers."""
    around, stated = Around.of(plan), budgets.read(plan.stated or None)
    problem = _problem(plan, menu, around, planner, plan.levers)
    if isinstance(stated, Bits):
        held = _counted(plan, menu)
        return problem, held, _left(held, stated.bytes(list(_linear(plan).values())))
    rates, rest = around.rates(menu, plan.levers)
    held = around.held(menu, rates)
    total = None if plan.budget is None else int(plan.budget * (1 - around.reserve))
    return problem, held, problem.left(held, rates, rest, plan.levers, total)


def trials(points: Sequence[kl_curve.Point], names: Sequence[str] = ()) -> tuple[int, list[dict[str, Any]]]:
    """Which choice really lost least, and what was tried, the best first: its name (κ, where `saturated` made them), predicted loss, measured
    KL and its error."""
    order = sorted(range(len(points)), key=lambda i: (points[i].measured, i))
    said = [{"choice": names[i]} if names else {"saturation": SATURATIONS[i]} for i in order]
    found = [{"loss": points[i].predicted, "kl": points[i].measured, "error": points[i].error} for i in order]
    return order[0], [s | f for s, f in zip(said, found, strict=True)]


def settled(
    plan: Plan, menu: Menu, choices: Sequence[Mapping[str, Option]], points: Sequence[kl_curve.Point], names: Sequence[str] = ()
) -> Plan:
    """The plan with the one of `choices` that really has the least KL; `points` are what was measured of each, in order."""
    best, tried = trials(points, names)
    picked = dict(choices[best])
    made = _with(plan, menu, Found(picked, plan.levers, 0.0), Around.of(plan))
    loss, bound = sum(o.loss for o in picked.values()), plan.solver["bound"]
    gap = max(loss - bound, 0.0) / bound if bound else 0.0
    solver = made.solver | {"loss": loss, "gap": gap, "trials": tried}
    if "blocks" in solver:
        solver["blocks"] = _blocks(made, menu, picked, planner_of(plan))
    if "kl" in solver:
        made = predicted(replace(made, solver=solver), [kl_curve.Point(v["loss"], v["kl"], v["error"]) for v in solver["kl"]["variants"]])
        solver = made.solver | {"kl": made.solver["kl"] | {"measured": tried[0]["kl"]}}
    alternatives = [row | ({"loss": loss, "peak": made.peak} if row["chosen"] else {}) for row in solver["alternatives"]]
    return replace(made, solver=solver | {"alternatives": alternatives})


def again(plan: Plan, budget: int | str | None = None, planner: Planner | None = None, pareto: int = 0, **levers: Any) -> Plan:
    """The plan for another budget, stated as in a recipe, or other levers, out of the same menu by the same planner: nothing is read or priced
    again."""
    plan = plan if budget is None else with_budget(plan, budget)
    return whole(replace(plan, levers=asked_of(plan) | levers), planner=planner, pareto=pareto)


def with_budget(plan: Plan, stated: int | str | float | None) -> Plan:
    """The plan with a budget as people state it, not solved yet."""
    read = stated if isinstance(stated, int) else budgets.read(stated)
    return replace(plan, budget=read, stated="") if isinstance(read, int | None) else replace(plan, budget=None, stated=str(stated))


def asked_of(plan: Plan) -> Levers:
    """The levers as they were before any was pulled."""
    return plan.levers | {k: v for k, v in plan.solver.get("asked", {}).items() if v is not None}


def menu_of(plan: Plan) -> dict[str, list[Option]]:
    """The menu that a plan was chosen from."""
    adapters = {int(rank): registry.from_json("adapters", a) for rank, a in plan.sizes.get("adapters", {}).items()}
    found = {}
    for name, spec in plan.modules.items():
        held = plan.costs.get(name, {})
        if not held.get("menu"):
            raise Invalid(f"this plan does not hold what {name} could have been: plan again")
        *experts, m, n = held["shape"]
        cells, specs = [], []
        for line in held["menu"]:
            format = registry.from_json("formats", line["format"])
            init = registry.from_json("init", line["init"]) if "init" in line else spec.init
            made = replace(spec, format=format, init=init, adapter=adapters.get(line.get("rank"), spec.adapter))
            scales = 0 if format is None else math.prod(experts) * cost.overhead(format, m, n)
            cells.append(cost.Cell(line["bytes"], scales, *cost.numbers(made.adapter, m, n), line["loss"]))
            specs.append(made)
        found[name] = cost.options(cells, specs)
        if "kurtosis" in held:
            found[name] = tailed(found[name], held["kurtosis"])
    return found


def tailed(options: Sequence[Option], kurtosis: float) -> list[Option]:
    """Options that say how heavy the tails of their layer's weights are."""
    return [replace(o, more={**o.more, "kurtosis": kurtosis}) for o in options]


def planner_of(plan: Plan) -> Planner:
    """The planner that a plan was made with; the default for one that none has solved yet."""
    held = plan.solver.get("planner")
    if held is None and "planner" in plan.solver:
        raise Invalid("this plan was made with a planner that finebits does not know: give it to again(plan, planner=…)")
    return Lagrange() if held is None else registry.from_json("planners", held)


def _known(planner: Planner) -> bool:
    return is_dataclass(planner) and type(planner).__module__.rpartition(".")[0] == "finebits.planners"


def _with(plan: Plan, menu: Menu, found: Found, around: Around) -> Plan:
    heads = {name for name in found.picked if plan.costs[name].get("head")}
    linears, head = (sum(o.bytes for name, o in found.picked.items() if (name in heads) == of) for of in (False, True))
    trained = around.chosen(found.picked)
    held = memory.terms(around.geometry, linears, trained, found.levers)
    costs = {name: plan.costs[name] | {"bytes": o.bytes, "loss": o.loss} for name, o in found.picked.items()}
    for name, o in found.picked.items():
        if any("rank" in line or "init" in line for line in costs[name]["menu"]):
            costs[name]["chosen"] = menu[name].index(o)
    seen = _seen(plan, {name: [o.spec] for name, o in found.picked.items()}, found.levers)
    rows = around.phases(linears + head, sum(max(o.bytes for o in menu[name]) for name in heads), found.levers, trained, seen)
    made = replace(
        plan,
        modules={name: o.spec for name, o in found.picked.items()},
        memory=held | {"head": held["head"] + head},
        rows=rows,
        host={"embeddings": apart} if (apart := memory.hosted(around.geometry, found.levers)) else {},
        levers=found.levers,
        costs=costs,
    )
    return replace(made, budget=around.budget(made.need)) if isinstance(budgets.read(plan.stated or None), Bits) else made


def _seen(plan: Plan, offered: Mapping[str, Sequence[Spec]], levers: Levers) -> memory.Swept | None:
    """The statistics of a start that runs the model, block by block; None where nothing asks for any. Where a matrix may be one of several
    specs, it asks for what all of them need."""
    specs = {name: several for name, several in offered.items() if len(plan.costs[name]["shape"]) == 2}
    wanted = {name: frozenset[type[Statistic]]().union(*(s.quantizer.needs | s.init.needs for s in v)) for name, v in specs.items()}
    refined = bool(levers.get("refine")) and any(s.format for v in specs.values() for s in v)
    if not refined and not any(wanted.values()):
        return None
    shapes = {name: plan.costs[name]["shape"][-2:] for name in specs}
    held = {name: cost.held(statistics, *shapes[name]) for name, statistics in wanted.items()}
    scales = {name: max((cost.scales(s.format, *shapes[name]) for s in v if s.format), default=0) for name, v in specs.items()}
    most, backward = max(held.values(), default=0), any(S.backward for statistics in wanted.values() for S in statistics)
    return memory.Swept(_most(held), most, backward, _most(scales), sum(scales.values()))


def _most(sizes: Mapping[str, int]) -> int:
    """The largest sum over the modules of one block."""
    blocks = Counter[str]()
    for name, size in sizes.items():
        block = re.match(r".*?\.\d+\.", name)
        blocks[block[0] if block else name] += size
    return max(blocks.values(), default=0)


def _width(option: Option) -> int:
    return 16 if option.spec.format is None else option.spec.format.bits


def uniform(menu: Menu, bits: int, adapted: Collection[str]) -> dict[str, Option] | None:
    """One candidate of `bits` bits for all `adapted` modules, the one that loses least. A module without a choice of formats or without such a
    one, as a fixed one, keeps its best, as do all others. None if those left share no such candidate."""
    several = {k: v for k, v in menu.items() if k in adapted and len({o.spec.format for o in v}) > 1}
    free = {k: v for k, v in several.items() if any(_width(o) == bits for o in v)}
    at = {k: dict(zip(specs, free[k], strict=True)) for k, specs in shared_specs(free).items()}
    shared = set[Any].intersection(*({s for s, o in v.items() if _width(o) == bits} for v in at.values())) if free else set()
    best = {k: min(v, key=lambda o: (o.loss, o.bytes)) for k, v in menu.items() if k not in free}
    made = []
    for spec in shared:
        picked = {k: best[k] if k in best else at[k][spec] for k in menu}
        made.append((sum(o.loss for o in picked.values()), sum(o.bytes for o in picked.values()), picked))
    return min(made, key=lambda m: m[:2])[2] if made else None


def alternatives(plan: Plan, problem: Problem, chosen: Found, asked: Levers) -> list[dict[str, Any]]:
    """What else there is, most memory first: one format everywhere, with the levers as asked and as chosen; the chosen plan, if it is none of
    these; all levers pulled, where they may not be; a lighter plan. `over` is what a row takes beyond the budget, None where there is none, and
    `saved` what it takes beyond a serve budget."""
    menu, around = problem.menu, problem.around
    total = None if plan.budget is None else int(plan.budget * (1 - around.reserve))
    linear = [name for name in menu if not plan.costs[name].get("head")]
    adapted = frozenset(name for name in linear if len(plan.costs[name]["shape"]) == 2)
    weights = sum(math.prod(plan.costs[name]["shape"]) for name in linear)
    rows: list[dict[str, Any]] = []

    def kind(picked: Mapping[str, Option], levers: Levers) -> Any:
        return {k: o.spec for k, o in picked.items()}, said(levers)

    def add(name: str, picked: Mapping[str, Option], levers: Levers) -> None:
        needs = problem.needs(picked, levers)
        largest = max(needs, key=lambda phase: needs[phase])
        row: dict[str, Any] = {
            "name": name,
            "bits": 8 * sum(picked[k].bytes for k in linear) / weights,
            "peak": needs["training"],
            "loss": sum(o.loss for o in picked.values()),
        }
        if around.serve is not None:
            saved = around.apart(levers) + int(sum(o.more["serve"] for o in picked.values()))
            row["saved"] = max(saved - around.serve, 0)
        row |= {
            "over": None if total is None else max(needs[largest] - total, 0),
            "chosen": kind(picked, levers) == own,
            "levers": said(levers),
        }
        rows.append(row | ({"breaks": largest} if row["over"] and largest != "training" else {}))

    own = kind(chosen.picked, chosen.levers)
    pulled = chosen.levers if said(chosen.levers) != said(asked) else None
    for bits in sorted({_width(o) for options in menu.values() for o in options if o.spec.format is not None}, reverse=True):
        picked = uniform(menu, bits, adapted)
        if picked is not None:
            add(f"{bits} bits everywhere", picked, asked)
            if pulled is not None:
                add(f"{bits} bits everywhere, levers pulled", picked, pulled)
    if not any(row["chosen"] for row in rows):
        add("mixed" + (", levers pulled" if pulled is not None else ""), chosen.picked, chosen.levers)
    if total is not None and not isinstance(budgets.read(plan.stated or None), Bits):
        found = joint(problem, total, asked, PULLS) if set(around.pulls) != set(PULLS) else None
        if found is not None and said(found.levers) != said(chosen.levers):
            add("mixed, all levers", found.picked, found.levers)
        light = joint(problem, int(plan.need * LIGHTER), asked, around.pulls)
        if light is not None:
            add("mixed, lighter", light.picked, light.levers)
    return sorted(rows, key=lambda r: (-r["peak"], r["loss"]))


def curve(problem: Problem, levers: Levers, count: int = POINTS) -> list[dict[str, Any]]:
    """What each of `count` budgets, evenly spaced from the smallest choice to the largest, would lose with these levers; those that side
    constraints leave nothing for are left out."""
    rates, _ = problem.around.rates(problem.menu, levers)
    held, cap = problem.around.held(problem.menu, rates), problem.cap(levers)
    low, high = smallest(held), sum(max(o.bytes for o in options) for options in held.values())
    high = high if cap is None else min(high, cap)
    points: dict[int, float] = {}
    for i in range(count):
        try:
            picked = problem.own(held, problem.solve(held, low + (high - low) * i // max(count - 1, 1))[0])
        except Infeasible:
            continue
        points[problem.around.peak(picked, levers)] = sum(o.loss for o in picked.values())
    return [{"peak": peak, "loss": loss} for peak, loss in sorted(points.items())]


def _servable(menu: Menu, around: Around, levers: Levers) -> None:
    """Raise Infeasible where even the smallest options exceed the serve budget."""
    if around.serve is None:
        return
    apart = around.apart(levers)
    least = apart + int(sum(min(o.more["serve"] for o in options) for options in menu.values()))
    if least > around.serve:
        raise Infeasible(
            f"Does not fit: the smallest model that can be saved takes {show(least)}, the serve budget is {show(around.serve)}.",
            least,
            f"Of these, {show(apart)} are embeddings, head and norms. Raise --serve-budget, or offer formats of fewer bits.",
        )
