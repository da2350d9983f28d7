"""Bits and levers chosen together: a priced menu, what is around it, and a budget give a plan; a plan gives another for another budget.

Every combination of the levers that may be pulled (`around`) is a budget for the bits; of the plans that lose at most 5 % more than the best of
them, the one whose levers slow training least is taken. Any planner chooses the bits, with its own side constraints and a second budget, and
solves again with them: a plan holds its planner.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, NamedTuple

from finebits import registry
from finebits.plan import _curve, cost, memory
from finebits.plan._knapsack import Menu, dual_bound, smallest
from finebits.plan.around import CHANGED, LEAST_CHUNK, PULLS, Around, Levers, Rates, said, variants
from finebits.plan.base import Infeasible, Option, Plan, Planner
from finebits.plan.dp import DP
from finebits.plan.lagrange import Lagrange
from finebits.plan.lq_lora_ilp import LQLoRAILP
from finebits.plan.memory import Trained
from finebits.plan.milp import MILP
from finebits.sizes import show

NEAR = 1.05  # a plan that loses this much more is as good, if its levers cost less time
SATURATIONS = (0.0, 1.0, 3.0, 10.0)
LIGHTER = 0.9  # of the chosen plan's peak: the lighter alternative
POINTS = 24  # of a Pareto curve


class Found(NamedTuple):
    """A choice, its levers, and a bound below which no choice with these levers can lose."""

    picked: dict[str, Option]
    levers: Levers
    bound: float


@dataclass(frozen=True)
class Problem:
    """A menu, what is around it, and who chooses."""

    menu: Menu
    around: Around
    planner: Planner

    @classmethod
    def of(cls, menu: Menu, around: Around, planner: Planner, levers: Levers) -> Problem:
        """Where ranks vary, bytes of training and of the saved model are two sums, which is a matter for the integer program."""
        if around.serve is not None and around.varied:
            given = planner if isinstance(planner, MILP) else MILP()
            planner = replace(given, serve=around.serve - around.apart(levers))
        return cls(menu, around, planner)

    def cap(self, levers: Levers) -> int | None:
        """What a second budget leaves for the menu's bytes, where that is the same sum but for what is fixed."""
        if self.around.serve is None or self.around.varied:
            return None
        fixed = int(sum(options[0].more["serve"] - options[0].bytes for options in self.menu.values()))
        return self.around.serve - self.around.apart(levers) - fixed

    def solve(self, menu: Menu, left: int) -> tuple[dict[str, Option], float]:
        """The planner's choice within `left` bytes, and a bound of its loss."""
        if isinstance(self.planner, MILP):
            found = self.planner.solve(menu, left)
            return found.choice, found.bound
        return self.planner(menu, left), dual_bound(menu, left)

    def own(self, held: Menu, picked: Mapping[str, Option]) -> dict[str, Option]:
        """A choice of `held` in the menu's own options."""
        return picked if held is self.menu else {name: self.menu[name][held[name].index(o)] for name, o in picked.items()}  # type: ignore[return-value]


def joint(problem: Problem, total: int | None, levers: Levers, pulls: Sequence[str]) -> Found | None:
    """The choice and the levers for a budget of `total` bytes of training peak (None: no limit); None if no combination fits.

    More bytes never lose more, so the best loss is that of the roomiest combinations; the others are tried from the fastest on, and those that
    a bound or a failure with more bytes rules out are passed over.
    """
    around, menus, tries = problem.around, dict[Rates, Menu](), list[tuple[Levers, Rates, int]]()
    for _, changed in sorted(variants(levers, pulls), key=lambda v: v[0]):
        rates, rest = around.rates(problem.menu, changed)
        if rates not in menus:
            menus[rates] = around.held(problem.menu, rates)
        held = menus[rates]
        left = sum(max(o.bytes for o in options) for options in held.values())
        left = min([left] + ([] if total is None else [total - rest]) + [c for c in [problem.cap(changed)] if c is not None])
        if left >= smallest(held):
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


def whole(plan: Plan, menu: Menu | None = None, planner: Planner | None = None, pareto: int = 0) -> Plan:
    """`plan` solved: bits and levers for its budgets, out of `menu` (its own if None), with alternatives and a Pareto curve beside them.

    `plan.levers` are the levers as they were asked for. Raises Infeasible, which names the smallest budget and what could be given up.
    """
    menu, planner, around = menu or menu_of(plan), planner or planner_of(plan), Around.of(plan)
    asked = {"embeddings": "device"} | plan.levers  # what a plan by hand need not say
    problem = Problem.of(menu, around, planner, asked)
    _servable(menu, around, asked)
    name = type(problem.planner).__module__.rsplit(".", 1)[-1]
    total = None if plan.budget is None else int(plan.budget * (1 - around.reserve))
    if total is None and around.serve is None and isinstance(problem.planner, Lagrange | DP | LQLoRAILP):
        found = Found({k: min(v, key=lambda o: (o.loss, o.bytes)) for k, v in menu.items()}, asked, 0.0)
        facts: dict[str, Any] = {"name": "unbounded", "bound": None, "gap": 0.0}
    else:
        found = joint(problem, total, asked, around.pulls if total is not None else ())
        if found is None:
            raise infeasible(problem, plan, asked)
        loss = sum(o.loss for o in found.picked.values())
        facts = {"name": name, "bound": found.bound, "gap": max(loss - found.bound, 0.0) / found.bound if found.bound > 0 else 0.0}
    made = _with(plan, menu, found, around)
    facts = plan.solver | facts | {"loss": sum(o.loss for o in found.picked.values()), "asked": {k: asked.get(k) for k in CHANGED}}
    facts["planner"] = registry.to_json(planner) if _known(planner) else None
    if around.serve is not None:
        saved = around.apart(asked) + int(sum(o.more["serve"] for o in found.picked.values()))
        facts["serve"] = {"budget": around.serve, "planned": saved}
    facts["alternatives"] = alternatives(made, problem, found, asked)
    facts["pareto"] = curve(problem, found.levers, pareto) if pareto else []
    made = replace(made, solver=facts)
    return predicted(made, [_curve.Point(v["loss"], v["kl"], v["error"]) for v in facts["kl"]["variants"]]) if "kl" in facts else made


def predicted(plan: Plan, points: Sequence[_curve.Point]) -> Plan:
    """The plan with the interval of its KL, and of its Pareto curve's, as variants that were really measured say."""
    fitted = _curve.fit(points)
    seen = [{"loss": p.predicted, "kl": p.measured, "error": p.error} for p in points]
    kl = {"interval": list(fitted(plan.solver["loss"])), "share": _curve.SHARE, "variants": seen}
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
    around = Around.of(plan)
    problem = Problem.of(menu, around, planner or planner_of(plan), plan.levers)
    rates, rest = around.rates(menu, plan.levers)
    held = around.held(menu, rates)
    limits = [sum(max(o.bytes for o in options) for options in held.values()), problem.cap(plan.levers)]
    limits += [] if plan.budget is None else [int(plan.budget * (1 - around.reserve)) - rest]
    left = min(v for v in limits if v is not None)
    return [problem.own(held, picked) for picked in saturated(held, lambda m: problem.solve(m, left)[0])]


def trials(points: Sequence[_curve.Point]) -> tuple[int, list[dict[str, float]]]:
    """Which of `saturated`'s choices really lost least, and what was tried, the best first: κ, predicted loss, measured KL and its error."""
    order = sorted(range(len(points)), key=lambda i: (points[i].measured, i))
    said = [{"saturation": SATURATIONS[i], "loss": points[i].predicted, "kl": points[i].measured, "error": points[i].error} for i in order]
    return order[0], said


def settled(plan: Plan, menu: Menu, choices: Sequence[Mapping[str, Option]], points: Sequence[_curve.Point]) -> Plan:
    """The plan with the one of `choices` that really has the least KL; `points` are what was measured of each, in order."""
    best, tried = trials(points)
    picked = dict(choices[best])
    made = _with(plan, menu, Found(picked, plan.levers, 0.0), Around.of(plan))
    loss, bound = sum(o.loss for o in picked.values()), plan.solver["bound"]
    gap = max(loss - bound, 0.0) / bound if bound else 0.0
    solver = made.solver | {"loss": loss, "gap": gap, "trials": tried}
    if "kl" in solver:
        made = predicted(replace(made, solver=solver), [_curve.Point(v["loss"], v["kl"], v["error"]) for v in solver["kl"]["variants"]])
        solver = made.solver | {"kl": made.solver["kl"] | {"measured": tried[0]["kl"]}}
    alternatives = [row | ({"loss": loss, "peak": made.peak} if row["chosen"] else {}) for row in solver["alternatives"]]
    return replace(made, solver=solver | {"alternatives": alternatives})


def again(plan: Plan, budget: int | None = None, planner: Planner | None = None, pareto: int = 0, **levers: Any) -> Plan:
    """The plan for another budget or other levers, out of the same menu by the same planner: nothing is read or priced again."""
    return whole(replace(plan, budget=budget or plan.budget, levers=asked_of(plan) | levers), planner=planner, pareto=pareto)


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
            raise ValueError(f"this plan does not hold what {name} could have been: plan again")
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
    return found


def planner_of(plan: Plan) -> Planner:
    """The planner that a plan was made with; the default for one that none has solved yet."""
    held = plan.solver.get("planner")
    if held is None and "planner" in plan.solver:
        raise ValueError("this plan was made with a planner that finebits does not know: give it to again(plan, planner=…)")
    return Lagrange() if held is None else registry.from_json("plan", held)


def _known(planner: Planner) -> bool:
    return is_dataclass(planner) and type(planner).__module__.rpartition(".")[0] == "finebits.plan"


def _with(plan: Plan, menu: Menu, found: Found, around: Around) -> Plan:
    heads = {name for name in found.picked if plan.costs[name].get("head")}
    linears, head = (sum(o.bytes for name, o in found.picked.items() if (name in heads) == of) for of in (False, True))
    trained = around.chosen(found.picked)
    held = memory.terms(around.geometry, linears, trained, found.levers)
    costs = {name: plan.costs[name] | {"bytes": o.bytes, "loss": o.loss} for name, o in found.picked.items()}
    for name, o in found.picked.items():
        if any("rank" in line or "init" in line for line in costs[name]["menu"]):
            costs[name]["chosen"] = menu[name].index(o)
    return replace(
        plan,
        modules={name: o.spec for name, o in found.picked.items()},
        memory=held | {"head": held["head"] + head},
        rows=memory.rows(around.geometry, linears + head, around.dense, trained, found.levers, _seen(plan, found)),
        host={"embeddings": apart} if (apart := memory.hosted(around.geometry, found.levers)) else {},
        levers=found.levers,
        costs=costs,
    )


def _seen(plan: Plan, found: Found) -> memory.Swept | None:
    """The statistics of a start that runs the model, block by block; None where nothing asks for any."""
    specs = {name: o.spec for name, o in found.picked.items() if o.spec.adapter is not None}
    wanted = {name: s.quantizer.needs | s.init.needs for name, s in specs.items()}
    refined = bool(found.levers.get("refine")) and any(s.format for s in specs.values())
    if not refined and not any(wanted.values()):
        return None
    held = {name: cost.held(statistics, *plan.costs[name]["shape"][-2:]) for name, statistics in wanted.items()}
    most = max(held.values(), default=0)
    blocks = Counter[str]()
    for name, size in held.items():
        block = re.match(r".*?\.\d+\.", name)
        blocks[block[0] if block else name] += size
    return memory.Swept(max(blocks.values(), default=0), most, any(S.backward for statistics in wanted.values() for S in statistics))


def _width(option: Option) -> int:
    return 16 if option.spec.format is None else option.spec.format.bits


def uniform(menu: Menu, bits: int) -> dict[str, Option] | None:
    """One candidate of `bits` bits everywhere, the one that loses least. A module without a choice of formats or without such a one, as a fixed
    one or the head, keeps its best. None if the others share no such candidate."""
    several = {k: v for k, v in menu.items() if len({o.spec.format for o in v}) > 1}
    free = {k: v for k, v in several.items() if any(_width(o) == bits for o in v) and all(o.spec.adapter for o in v)}
    shared = set[Any].intersection(*({o.spec for o in v if _width(o) == bits} for v in free.values())) if free else set()
    best = {k: min(v, key=lambda o: (o.loss, o.bytes)) for k, v in menu.items() if k not in free}
    made = []
    for spec in shared:
        picked = {k: best[k] if k in best else next(o for o in v if o.spec == spec) for k, v in menu.items()}
        made.append((sum(o.loss for o in picked.values()), sum(o.bytes for o in picked.values()), picked))
    return min(made, key=lambda m: m[:2])[2] if made else None


def alternatives(plan: Plan, problem: Problem, chosen: Found, asked: Levers) -> list[dict[str, Any]]:
    """What else there is, most memory first: one format everywhere, with the levers as asked and as chosen; the chosen plan; all levers
    pulled, where they may not be; a lighter plan. `over` is what a row takes beyond the budget, None where there is none, and `saved` what it
    takes beyond a serve budget."""
    menu, around = problem.menu, problem.around
    total = None if plan.budget is None else int(plan.budget * (1 - around.reserve))
    linear = [name for name in menu if not plan.costs[name].get("head")]
    weights = sum(math.prod(plan.costs[name]["shape"]) for name in linear)
    rows: list[dict[str, Any]] = []

    def add(name: str, picked: Mapping[str, Option], levers: Levers, chosen: bool = False) -> None:
        peak = around.peak(picked, levers)
        row = {
            "name": name,
            "bits": 8 * sum(picked[k].bytes for k in linear) / weights,
            "peak": peak,
            "loss": sum(o.loss for o in picked.values()),
        }
        if around.serve is not None:
            saved = around.apart(levers) + int(sum(o.more["serve"] for o in picked.values()))
            row["saved"] = max(saved - around.serve, 0)
        rows.append(row | {"over": None if total is None else max(peak - total, 0), "chosen": chosen, "levers": said(levers)})

    pulled = chosen.levers if said(chosen.levers) != said(asked) else None
    for bits in sorted({_width(o) for options in menu.values() for o in options if o.spec.format is not None}, reverse=True):
        picked = uniform(menu, bits)
        if picked is not None:
            add(f"{bits} bits everywhere", picked, asked)
            if pulled is not None:
                add(f"{bits} bits everywhere, levers pulled", picked, pulled)
    add("mixed" + (", levers pulled" if pulled is not None else ""), chosen.picked, chosen.levers, True)
    if total is not None:
        found = joint(problem, total, asked, PULLS) if set(around.pulls) != set(PULLS) else None
        if found is not None and said(found.levers) != said(chosen.levers):
            add("mixed, all levers", found.picked, found.levers)
        light = joint(problem, int(plan.peak * LIGHTER), asked, around.pulls)
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


def infeasible(problem: Problem, plan: Plan, levers: Levers) -> Infeasible:
    """What to say when nothing fits: the smallest budget, and what could be given up, each alone, least harm first."""
    around, menu, budget = problem.around, problem.menu, plan.budget or 0
    share = 1 - around.reserve
    lightest = min((lv for _, lv in variants(levers, around.pulls)), key=lambda lv: around.least(menu, lv))
    rates, rest = around.rates(menu, lightest)
    held, kind = around.held(menu, rates), "all matrices at the smallest candidate"
    least = smallest(held)
    try:
        problem.solve(held, least)
    except Infeasible as e:
        if type(e) is not Infeasible:
            raise
        least, kind = e.smallest, "the smallest that its planner may choose"
        cap = problem.cap(lightest)
        if around.serve is not None and cap is not None and least > cap:
            needed = around.serve + least - cap
            took = f"the smallest model that can be saved ({kind}) takes {show(needed)}"
            message = f"Does not fit: {took}, the serve budget is {show(around.serve)}."
            return Infeasible(message, needed, "Raise --serve-budget, or loosen what the planner must keep to.")
    needed = int((least + rest) / share) + 1
    short = needed - budget
    message = f"Does not fit: the smallest plan ({kind}) needs {show(needed)}, the budget is {show(budget)}."
    now = around.least(menu, lightest)
    ways = [
        ((now - around.least(menu, lightest | change)) / share, text, note) for text, change, note in _ways(plan, levers, lightest, around)
    ]
    rank = around.trained.rank
    if rank > 1 and not around.varied:
        less = replace(around, trained=Trained(around.trained.trained // 2, around.trained.frozen // 2, rank // 2))
        ways.append(((around.rest(lightest) - less.rest(lightest)) / share, f"adapter.rank={rank // 2}", "learns less"))
    lines = [f"  budget.memory={-(-needed // 2**20)}MiB".ljust(50) + "fits"]
    for saved, text, note in sorted(ways, key=lambda w: w[0] < short):  # those that are enough come first, else in the order above
        if saved > 0:
            lines.append(f"  {text}".ljust(50) + f"saves {show(saved):<11}" + ("fits" if saved >= short else "    ") + f"  {note}".rstrip())
    lines.append("  a smaller base model".ljust(50) + "finebits plan --what-fits BUDGET MODEL MODEL compares")
    return Infeasible(message, needed, "What could be given up, each alone:\n" + "\n".join(lines))


def _ways(plan: Plan, asked: Levers, lightest: Levers, around: Around) -> Iterator[tuple[str, Levers, str]]:
    free = min((lv for _, lv in variants(asked, PULLS)), key=around.rest)
    if set(around.pulls) != set(PULLS):
        nats = plan.solver.get("objective") in ("fisher", "kl")  # a head of its own has no price in nats
        text = f"budget.levers=[{','.join(p for p in PULLS if p != 'head')}]" if nats else "budget.levers=all"
        yield text, {k: free[k] for k in CHANGED if k in free}, f"same training, slower: {said(free)}"
    b, passes = lightest["per_device_train_batch_size"], lightest["gradient_accumulation_steps"]
    if b > 1:
        text = f"training.per_device_train_batch_size={b // 2}"
        yield text, {"per_device_train_batch_size": b // 2}, f"with gradient_accumulation_steps={2 * passes} the same steps"
    if not lightest["gradient_checkpointing"]:
        yield "training.gradient_checkpointing=true", {"gradient_checkpointing": True}, "about a third slower"
    if lightest["loss_chunk"] > LEAST_CHUNK:
        chunk = max(lightest["loss_chunk"] // 4, LEAST_CHUNK)
        yield f"training.loss_chunk={chunk}", {"loss_chunk": chunk}, "the same loss"
    if lightest["max_length"] > 64:
        half = lightest["max_length"] // 2
        cut = sum(n for upto, n in lightest.get("lengths") or [] if upto > half)
        rows = sum(n for _, n in lightest.get("lengths") or [])
        note = f"cuts {100 * cut / rows:.1f} % of the rows" if rows else "cuts longer rows"
        yield f"data.max_length={half}", {"max_length": half}, note
