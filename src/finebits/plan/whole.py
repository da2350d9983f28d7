"""Bits and levers chosen together: a priced menu, what is around it, and a budget give a plan; a plan gives another for another budget.

A lever is a setting of training that changes what it holds and not what it learns: micro-batch and accumulation (the same effective batch),
checkpointing, tokens a chunk of the loss, the optimizer's state in 8 bits, and the output head in 8 bits, which is a matrix of the menu (marked
in `plan.costs`) where it may be chosen. Every combination of those that may be pulled is solved; of
the plans that lose at most 5 % more than the best of them, the one whose levers slow training least is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finebits import registry
from finebits.plan import memory
from finebits.plan._knapsack import Menu, dual_bound, smallest
from finebits.plan.base import Infeasible, Option, Plan, Planner
from finebits.plan.lagrange import Lagrange
from finebits.plan.memory import Geometry, Trained
from finebits.sizes import show

PULLS = ("micro_batch", "checkpointing", "loss_chunk", "optim", "head")
NEAR = 1.05  # a plan that loses this much more is as good, if its levers cost less time
LEAST_CHUNK = 32
LIGHTER = 0.9  # of the chosen plan's peak: the lighter alternative
POINTS = 24  # of a Pareto curve

# Rough: they put levers into an order and predict no time. Checkpointing computes the forward pass again, a third of a step's work.
SLOWER = {"checkpointing": 1.33, "halved micro-batch": 1.02, "halved chunk": 1.01, "optim": 1.01}

Levers = dict[str, Any]


@dataclass(frozen=True)
class Around:
    """What is in memory beside the planned weights: the rest of the model, the adapters, and the bytes of the weights were they dense."""

    geometry: Geometry
    trained: Trained
    dense: int
    reserve: float = 0.0  # share of the budget that stays free
    pulls: tuple[str, ...] = ()  # levers that may be pulled

    def rest(self, levers: Mapping[str, Any]) -> int:
        """The training peak less the planned weights."""
        return sum(memory.terms(self.geometry, 0, self.trained, levers).values())

    def to_json(self) -> dict[str, Any]:
        held = {"geometry": self.geometry.to_json(), "trained": self.trained.to_json()}
        return held | {"dense": self.dense, "reserve": self.reserve, "pulls": list(self.pulls)}

    @classmethod
    def of(cls, plan: Plan) -> Around:
        """The inverse, from `plan.sizes`. Raises ValueError if the plan was written without them."""
        held = plan.sizes
        if not held:
            raise ValueError("this plan does not hold the sizes of its model (an older plan, or one written by hand): plan again")
        return cls(Geometry(**held["geometry"]), Trained(**held["trained"]), held["dense"], held["reserve"], tuple(held["pulls"]))


def menu_of(plan: Plan) -> dict[str, list[Option]]:
    """The menu that a plan was chosen from."""
    found = {}
    for name, spec in plan.modules.items():
        listed = plan.costs.get(name, {}).get("menu")
        if not listed:
            raise ValueError(f"this plan does not hold what {name} could have been: plan again")
        formats = [registry.from_json("formats", o["format"]) for o in listed]
        found[name] = [Option(replace(spec, format=f), o["bytes"], o["loss"]) for f, o in zip(formats, listed, strict=True)]
    return found


def variants(levers: Levers, pulls: Sequence[str]) -> Iterator[tuple[float, Levers]]:
    """(how much slower, levers) for every combination of what may be pulled; the levers as they are come first."""
    batch, passes = levers["per_device_train_batch_size"], levers["gradient_accumulation_steps"]
    chunks, batches = [levers["loss_chunk"]], [batch]
    while "micro_batch" in pulls and batches[-1] % 2 == 0:
        batches.append(batches[-1] // 2)
    while "loss_chunk" in pulls and chunks[-1] // 2 >= LEAST_CHUNK:
        chunks.append(chunks[-1] // 2)
    kept = [levers["gradient_checkpointing"]]
    kept += [True] if "checkpointing" in pulls and not kept[0] else []
    optims = [levers.get("optim", "adamw_torch")]
    optims += ["adamw_bnb_8bit"] if "optim" in pulls and levers["device"] == "cuda" and optims[0] == "adamw_torch" else []
    for i, b in enumerate(batches):
        for j, chunk in enumerate(chunks):
            for checkpointing in kept:
                for k, optim in enumerate(optims):
                    slower = SLOWER["halved micro-batch"] ** i * SLOWER["halved chunk"] ** j * SLOWER["optim"] ** k
                    slower *= SLOWER["checkpointing"] if checkpointing else 1.0
                    changed = {"per_device_train_batch_size": b, "gradient_accumulation_steps": passes * (batch // b)}
                    changed |= {"loss_chunk": chunk, "gradient_checkpointing": checkpointing, "optim": optim}
                    yield slower, levers | changed


def joint(menu: Menu, total: int, around: Around, levers: Levers, planner: Planner = Lagrange()) -> tuple[dict[str, Option], Levers] | None:
    """The choice and the levers for a budget of `total` bytes of training peak; None if no combination fits. Levers are chosen by Lagrange's
    plans, which take milliseconds; the choice under them is the planner's."""
    least, quick, found = smallest(menu), Lagrange(), []
    solved: dict[int, tuple[float, dict[str, Option]]] = {}
    for slower, changed in sorted(variants(levers, around.pulls), key=lambda v: v[0]):
        left = total - around.rest(changed)
        if left < least:
            continue
        if left not in solved:
            picked = quick(menu, left)
            solved[left] = sum(o.loss for o in picked.values()), picked
        found.append((slower, *solved[left], changed))
    if not found:
        return None
    best = min(loss for _, loss, _, _ in found)
    _, _, picked, changed = next(f for f in found if f[1] <= best * NEAR + 1e-12)
    return (picked if planner == quick else planner(menu, total - around.rest(changed))), changed


def whole(plan: Plan, menu: Menu | None = None, planner: Planner | None = None, pareto: int = 0) -> Plan:
    """`plan` solved: bits and levers for its budget, out of `menu` (its own if None), with alternatives and a Pareto curve beside them.

    `plan.levers` are the levers as they were asked for. Raises Infeasible, which names the smallest budget and what could be given up.
    """
    menu, planner, around = menu or menu_of(plan), planner or Lagrange(), Around.of(plan)
    name = type(planner).__module__.rsplit(".", 1)[-1]
    asked = plan.levers
    if plan.budget is None:
        picked, levers = {k: min(v, key=lambda o: (o.loss, o.bytes)) for k, v in menu.items()}, asked
        facts: dict[str, Any] = {"name": "unbounded", "bound": None, "gap": 0.0}
    else:
        total = int(plan.budget * (1 - around.reserve))
        found = joint(menu, total, around, asked, planner)
        if found is None:
            raise infeasible(menu, plan.budget, around, asked)
        picked, levers = found
        bound = dual_bound(menu, total - around.rest(levers))
        loss = sum(o.loss for o in picked.values())
        facts = {"name": name, "bound": bound, "gap": (loss - bound) / bound if bound > 0 else 0.0}
    made = _with(plan, picked, levers, around)
    facts = plan.solver | facts | {"loss": sum(o.loss for o in picked.values()), "asked": {k: asked.get(k) for k in CHANGED}}
    facts["alternatives"] = alternatives(made, menu, around, asked)
    facts["pareto"] = curve(menu, around, levers, pareto) if pareto else []
    return replace(made, solver=facts)


CHANGED = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "loss_chunk", "optim")


def again(plan: Plan, budget: int | None = None, planner: Planner | None = None, pareto: int = 0, **levers: Any) -> Plan:
    """The plan for another budget or other levers, out of the same menu: nothing is read or priced again."""
    return whole(replace(plan, budget=budget or plan.budget, levers=asked_of(plan) | levers), planner=planner, pareto=pareto)


def asked_of(plan: Plan) -> Levers:
    """The levers as they were before any was pulled."""
    return plan.levers | {k: v for k, v in plan.solver.get("asked", {}).items() if v is not None}


def _with(plan: Plan, picked: Mapping[str, Option], levers: Levers, around: Around) -> Plan:
    heads = {name for name in picked if plan.costs[name].get("head")}
    linears, head = (sum(o.bytes for name, o in picked.items() if (name in heads) == of) for of in (False, True))
    held = memory.terms(around.geometry, linears, around.trained, levers)
    costs = {name: plan.costs[name] | {"bytes": o.bytes, "loss": o.loss} for name, o in picked.items()}
    return replace(
        plan,
        modules={name: o.spec for name, o in picked.items()},
        memory=held | {"head": held["head"] + head},
        rows=memory.rows(around.geometry, linears + head, around.dense, around.trained, levers),
        levers=levers,
        costs=costs,
    )


def _width(option: Option) -> int:
    return 16 if option.spec.format is None else option.spec.format.bits


def uniform(menu: Menu, bits: int) -> dict[str, Option] | None:
    """One format of `bits` bits everywhere, the one that loses least. A module without a dense or such an option to choose, as a fixed one or
    the head, keeps its best. None if the others share no such format."""
    free = {k: v for k, v in menu.items() if len(v) > 1 and any(_width(o) == bits for o in v) and all(o.spec.adapter for o in v)}
    shared = set[Any].intersection(*({o.spec.format for o in v if _width(o) == bits} for v in free.values())) if free else set()
    made = []
    for format in shared:
        best = {k: min(v, key=lambda o: (o.loss, o.bytes)) for k, v in menu.items() if k not in free}
        picked = {k: best[k] if k in best else next(o for o in v if o.spec.format == format) for k, v in menu.items()}
        made.append((sum(o.loss for o in picked.values()), sum(o.bytes for o in picked.values()), picked))
    return min(made, key=lambda m: m[:2])[2] if made else None


def alternatives(plan: Plan, menu: Menu, around: Around, asked: Levers) -> list[dict[str, Any]]:
    """What else there is, most memory first: one format everywhere, with the levers as asked and as chosen; the chosen plan; all levers
    pulled, where they may not be; a lighter plan. `over` is what a row takes beyond the budget, None where there is none."""
    total = None if plan.budget is None else int(plan.budget * (1 - around.reserve))
    linear = [name for name in menu if not plan.costs[name].get("head")]
    weights = sum(math.prod(plan.costs[name]["shape"]) for name in linear)
    rows: list[dict[str, Any]] = []

    def add(name: str, picked: Mapping[str, Option], levers: Levers, chosen: bool = False) -> None:
        held = sum(o.bytes for o in picked.values())
        peak = held + around.rest(levers)
        row = {
            "name": name,
            "bits": 8 * sum(picked[k].bytes for k in linear) / weights,
            "peak": peak,
            "loss": sum(o.loss for o in picked.values()),
        }
        rows.append(row | {"over": None if total is None else max(peak - total, 0), "chosen": chosen, "levers": said(levers)})

    pulled = plan.levers if said(plan.levers) != said(asked) else None
    for bits in sorted({_width(o) for options in menu.values() for o in options if o.spec.format is not None}, reverse=True):
        picked = uniform(menu, bits)
        if picked is not None:
            add(f"{bits} bits everywhere", picked, asked)
            if pulled is not None:
                add(f"{bits} bits everywhere, levers pulled", picked, pulled)
    chosen = {name: Option(spec, plan.costs[name]["bytes"], plan.costs[name]["loss"]) for name, spec in plan.modules.items()}
    add("mixed" + (", levers pulled" if pulled is not None else ""), chosen, plan.levers, True)
    if total is not None:
        free = replace(around, pulls=PULLS)
        found = joint(menu, total, free, asked) if set(around.pulls) != set(PULLS) else None
        if found is not None and said(found[1]) != said(plan.levers):
            add("mixed, all levers", *found)
        light = joint(menu, int(plan.peak * LIGHTER), around, asked)
        if light is not None:
            add("mixed, lighter", *light)
    return sorted(rows, key=lambda r: (-r["peak"], r["loss"]))


def said(levers: Mapping[str, Any]) -> str:
    """The levers that may be pulled, in words."""
    parts = [f"micro-batch {levers['per_device_train_batch_size']} x {levers['gradient_accumulation_steps']}"]
    parts += ["checkpointing" if levers["gradient_checkpointing"] else "no checkpointing", f"loss chunk {levers['loss_chunk']}"]
    return ", ".join(parts + (["8-bit Adam"] if levers.get("optim") == "adamw_bnb_8bit" else []))


def curve(menu: Menu, around: Around, levers: Levers, count: int = POINTS) -> list[dict[str, float]]:
    """What each of `count` budgets, evenly spaced from the smallest choice to the largest, would lose with these levers."""
    low, high, rest = smallest(menu), sum(max(o.bytes for o in options) for options in menu.values()), around.rest(levers)
    points: dict[int, float] = {}
    for i in range(count):
        picked = Lagrange()(menu, low + (high - low) * i // max(count - 1, 1))
        points[rest + sum(o.bytes for o in picked.values())] = sum(o.loss for o in picked.values())
    return [{"peak": peak, "loss": loss} for peak, loss in sorted(points.items())]


def infeasible(menu: Menu, budget: int, around: Around, levers: Levers) -> Infeasible:
    """What to say when nothing fits: the smallest budget, and what could be given up, each alone, least harm first."""
    share, least = 1 - around.reserve, smallest(menu)
    lightest = min((lv for _, lv in variants(levers, around.pulls)), key=around.rest)
    needed = int((least + around.rest(lightest)) / share) + 1
    short = needed - budget
    weights = "all matrices at the smallest candidate"
    message = f"Does not fit: the smallest plan ({weights}) needs {show(needed)}, the budget is {show(budget)}."
    ways = [(_saves(around, lightest, change) / share, text, note) for text, change, note in _ways(levers, lightest, around)]
    rank = around.trained.rank
    if rank > 1:
        less = replace(around, trained=Trained(around.trained.trained // 2, around.trained.frozen // 2, rank // 2))
        ways.append(((around.rest(lightest) - less.rest(lightest)) / share, f"adapter.rank={rank // 2}", "learns less"))
    lines = [f"  budget.memory={-(-needed // 2**20)}MiB".ljust(50) + "fits"]
    for saved, text, note in sorted(ways, key=lambda w: w[0] < short):  # those that are enough come first, else in the order above
        if saved > 0:
            lines.append(f"  {text}".ljust(50) + f"saves {show(saved):<11}" + ("fits" if saved >= short else "    ") + f"  {note}".rstrip())
    lines.append("  a smaller base model".ljust(50) + "finebits plan --what-fits BUDGET MODEL MODEL compares")
    return Infeasible(message, needed, "What could be given up, each alone:\n" + "\n".join(lines))


def _saves(around: Around, levers: Levers, change: Levers) -> int:
    return around.rest(levers) - around.rest(levers | change)


def _ways(asked: Levers, lightest: Levers, around: Around) -> Iterator[tuple[str, Levers, str]]:
    free = min((lv for _, lv in variants(asked, PULLS)), key=around.rest)
    if set(around.pulls) != set(PULLS):
        yield "budget.levers=all", {k: free[k] for k in CHANGED if k in free}, f"same training, slower: {said(free)}"
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
