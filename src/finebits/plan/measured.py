"""What plans really lose: choices that differ are quantized and evaluated by the caller, and here it is said which, and what follows from it.

Losses that are predicted do not quite add up. The KL of a plan is read off a curve through measured ones (`kl_curve`), and of several choices
the one that measures least is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finebits.plan import kl_curve
from finebits.plan.allocation import Allocation
from finebits.plan.base import Option, Plan
from finebits.plan.footprint import Footprint
from finebits.plan.planner import Menu, Planner
from finebits.plan.problem import explained, planned, planner_of, room_of

SATURATIONS = (0.0, 1.0, 3.0, 10.0)


def predicted(plan: Plan, points: Sequence[kl_curve.Point]) -> Plan:
    """The plan with the interval of its KL, and of its Pareto curve's, as variants that were really measured say."""
    fitted = kl_curve.fit(points)
    variants = [{"loss": p.predicted, "kl": p.measured, "error": p.error} for p in points]
    kl = {"interval": list(fitted(plan.solver["loss"])), "share": kl_curve.SHARE, "variants": variants}
    pareto = [p | {"kl": list(fitted(p["loss"]))} for p in plan.solver["pareto"]]
    return replace(plan, solver=plan.solver | {"kl": kl, "pareto": pareto})


def saturated(menu: Menu, choose: Callable[[Menu], Mapping[str, Option]]) -> list[dict[str, Option]]:
    """The choices with the least Σ log(1 + κ·loss) / κ, one for each κ in SATURATIONS.

    κ = 0 is the plain sum; with a larger κ a matrix that is lost already cannot lose much more, which is what a sum of second-order
    estimates does not know where the KL is above one.

    >>> few, many = fb.Spec(fb.NF(2)), fb.Spec(fb.NF(4))
    >>> menu = {"a": [fb.Option(few, 10, 100.0), fb.Option(many, 20, 50.0)], "b": [fb.Option(few, 10, 1.0), fb.Option(many, 20, 0.1)]}
    >>> [[o.bytes for o in choice.values()] for choice in saturated(menu, lambda m: fb.Lagrange()(m, 30))]  # a is lost either way
    [[20, 10], [20, 10], [10, 20], [10, 20]]
    """
    choices = []
    for k in SATURATIONS:
        bent = {name: [replace(o, loss=math.log1p(k * o.loss) / k) if k else o for o in options] for name, options in menu.items()}
        picked = choose(bent)
        choices.append({name: menu[name][next(i for i, o in enumerate(bent[name]) if o is picked[name])] for name in menu})
    return choices


def contenders(plan: Plan, menu: Menu, planner: Planner | None = None) -> list[dict[str, Option]]:
    """`saturated` choices for the plan's budgets under the plan's levers."""
    problem, costed, left = room_of(plan, menu, planner or planner_of(plan))
    return [problem.own(costed, picked) for picked in saturated(costed, lambda m: problem.planner(m, left))]


def neighbours(plan: Plan, menu: Menu, planner: Planner) -> dict[str, dict[str, Option]]:
    """What lies around a plan and is worth a trial, by name, those that hold least first."""
    problem, costed, left = room_of(plan, menu, planner)
    optimum = {name: next(o for o in options if o.spec == plan.modules[name]) for name, options in costed.items()}
    choices = {label: problem.own(costed, picked) for label, picked in planner.neighbours(costed, left, optimum)}
    return dict(sorted(choices.items(), key=lambda f: sum(o.bytes for o in f[1].values())))


def trials(points: Sequence[kl_curve.Point], names: Sequence[str] = ()) -> tuple[int, list[dict[str, Any]]]:
    """Which choice really lost least, and what was tried, the best first: its name (κ, where `saturated` made them), predicted loss, measured
    KL and its error.

    >>> best, tried = trials([kl_curve.Point(1.0, 0.3), kl_curve.Point(1.2, 0.2)], ["optimum", "uniform 64"])
    >>> best, tried[0]
    (1, {'choice': 'uniform 64', 'loss': 1.2, 'kl': 0.2, 'error': 0.0})
    """
    order = sorted(range(len(points)), key=lambda i: (points[i].measured, i))
    labels = [{"choice": names[i]} if names else {"saturation": SATURATIONS[i]} for i in order]
    results = [{"loss": points[i].predicted, "kl": points[i].measured, "error": points[i].error} for i in order]
    return order[0], [s | f for s, f in zip(labels, results, strict=True)]


def settled(
    plan: Plan, menu: Menu, choices: Sequence[Mapping[str, Option]], points: Sequence[kl_curve.Point], names: Sequence[str] = ()
) -> Plan:
    """The plan with the one of `choices` that really has the least KL; `points` are what was measured of each, in order."""
    best, tried = trials(points, names)
    picked = dict(choices[best])
    chosen = planned(plan, menu, Allocation(picked, plan.levers, 0.0), Footprint.of(plan))
    loss, bound = sum(o.loss for o in picked.values()), plan.solver["bound"]
    gap = max(loss - bound, 0.0) / bound if bound else 0.0
    solver = chosen.solver | {"loss": loss, "gap": gap, "trials": tried}
    if "blocks" in solver:
        solver["blocks"] = explained(chosen, menu, picked, planner_of(plan))
    if "kl" in solver:
        chosen = predicted(
            replace(chosen, solver=solver), [kl_curve.Point(v["loss"], v["kl"], v["error"]) for v in solver["kl"]["variants"]]
        )
        solver = chosen.solver | {"kl": chosen.solver["kl"] | {"measured": tried[0]["kl"]}}
    alternatives = [row | ({"loss": loss, "peak": chosen.peak} if row["chosen"] else {}) for row in solver["alternatives"]]
    return replace(chosen, solver=solver | {"alternatives": alternatives})
