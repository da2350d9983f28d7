"""Which of several adapters: the one beside which the budget leaves the weights the least loss.

Every adapter is planned for as if it were the recipe's, with its own parameters, gradients, optimizer state and activations, and the budget
buys bits with what these leave. That is arithmetic of memory: what an adapter learns is not known here, and nothing is said of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finebits import registry
from finebits.interop.selecting import Mistake
from finebits.optim import base as optimizers
from finebits.plan import budget as budgets
from finebits.plan import memory
from finebits.plan.base import Infeasible, Plan, at_end
from finebits.plan.footprint import Footprint
from finebits.plan.levers import in_words
from finebits.sizes import show

if TYPE_CHECKING:
    from finebits.recipe.settings import Settings

Line = dict[str, Any]


def best(settings: Settings, budget: str | int | float | None, plan_of: Callable[[Settings], Plan]) -> Plan:
    """The plan that loses least, of equals the one whose adapter is named first; `plan.solver["adapters"]` tells of all of them. Raises
    Infeasible with what each would need where none fits."""
    _refuse(settings, budget)
    plans, lines = list[Plan](), list[Line]()
    for i, (adapter, init) in enumerate(settings.choose):
        line = {"adapter": registry.to_json(adapter), "init": registry.to_json(init), "chosen": False}
        try:
            plan = plan_of(replace(settings, adapter=adapter, init=init, choose=()))
        except Infeasible as e:
            lines.append(line | {"needs": e.smallest, "fits": False})
        except Mistake as e:
            raise Mistake(f"adapter.choose.{i}: {e}") from e
        else:
            plans.append(plan)
            lines.append(line | {"needs": plan.need, "fits": True} | taken(plan))
    if not plans:
        least = min(lines, key=lambda line: line["needs"])
        each = [f"  {line['adapter']['paper']}".ljust(50) + f"needs {show(line['needs'])}" for line in lines]
        said = show(limit) if isinstance(limit := budgets.read(budget), int) else f"{show(settings.serve_budget or 0)} as it is saved"
        first = f"the smallest plan, with {least['adapter']['paper']}, needs {show(least['needs'])}, and the budget is {said}"
        raise Infeasible(f"Does not fit with any adapter of adapter.choose: {first}.", least["needs"], "\n".join(each))
    chosen = min(plans, key=lambda plan: plan.solver["loss"])
    fitting = [line for line in lines if line["fits"]]
    fitting[plans.index(chosen)]["chosen"] = True
    return replace(chosen, solver=chosen.solver | {"adapters": lines})


def taken(plan: Plan) -> Line:
    """What the adapters of a plan take in a step, in bytes, and what that has left to the weights."""
    footprint = Footprint.of(plan)
    g, t, work = footprint.geometry, footprint.trained, plan.workload
    linear = sum(math.prod(cost["shape"]) for cost in plan.costs.values() if at_end(cost) is None)
    kind, full = optimizers.named(plan.levers.optim), sum(m * n * count for m, n, count in g.full)  # weights that are trained themselves
    hold = memory.again if plan.levers.gradient_checkpointing else memory.kept
    return {
        "trained": t.trained + full,
        "parameters": 4 * (t.trained + t.frozen),
        "gradients": 4 * t.trained + plan.levers.width * full,
        "optimizer": kind.state(t.trained) + sum(count * kind.matrix(m, n) for m, n, count in g.full),
        "activations": max(hold(g, t, batch, plan.levers) for batch in memory.batches(work)),
        "weights": sum(cost["bytes"] for cost in plan.costs.values()),
        "bits": 8 * plan.memory["linear weights"] / linear,
        "loss": plan.solver["loss"],
        "levers": in_words(plan.levers),
    }


def _refuse(settings: Settings, budget: Any) -> None:
    """Raise Mistake where there is nothing to choose by, or another choice is asked for that this one would have to be made with."""
    if not isinstance(budgets.read(budget), int) and settings.serve_budget is None:
        came = "without a limit" if budget is None else f"{budget}, which is no size"
        raise Mistake(
            f"adapter.choose takes the adapter that leaves the weights most of budget.memory, and that is {came}: state it in bytes (8GiB)"
        )
    for key, asked in (("ranks", settings.ranks or settings.ranking), ("inits", settings.inits)):
        if asked:
            raise Mistake(
                f"adapter.choose and adapter.{key} are two choices, and each needs the other to be made: leave one of the two out"
            )
