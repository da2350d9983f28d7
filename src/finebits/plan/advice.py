"""What a planner says beside a plan: what could be given up where nothing fits, and what the rest could buy where much is left over."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from finebits.adapters.base import of_rank
from finebits.formats.base import Format
from finebits.formats.int import Int
from finebits.plan import cost
from finebits.plan.around import CHANGED, LEAST_CHUNK, PULLS, Around, Levers, said, variants
from finebits.plan.base import Infeasible, Option, Plan
from finebits.plan.joint import Found, Problem, joint
from finebits.plan.knapsack import smallest
from finebits.plan.memory import Trained
from finebits.planners.lagrange import Lagrange
from finebits.planners.milp import MILP
from finebits.planners.uniform import Uniform
from finebits.sizes import show

PHASES = {  # beside training: what happens there, and the line of a recipe that does without it
    "full": ("scoring the full-precision model", "evaluation.full_precision=false"),
    "samples": ("samples of the full-precision model", "evaluation.samples=0"),
    "statistics": ("gathering statistics for the start", ""),
    "start": ("quantizing and starting the adapters", ""),
    "load": ("loading the model", ""),
    "eval": ("scoring the tuned model", ""),
    "save": ("saving the model", ""),
    "export": ("exporting the model", "export.to=[]"),
    "verify": ("verifying the export", "export.verify=false"),
    "lora16": ("training the 16-bit LoRA to compare with", "evaluation.compare without lora16"),
}
UNUSED = 0.1  # of what a plan may spend: more is worth a word
TIMES = (2, 4, 8)  # how much of a setting the rest may buy
EIGHT = Int(8, block=128, scale="bf16")


def least(problem: Problem, levers: Mapping[str, Any]) -> dict[str, int]:
    """What every phase takes at least, training first."""
    around, menu = problem.around, problem.menu
    return {"training": around.least(menu, levers)} | problem.phases(smallest(menu), levers, around.least_trained(menu))


def infeasible(problem: Problem, plan: Plan, levers: Levers) -> Infeasible:
    """What to say when nothing fits: the phase that breaks the budget, the smallest budget, and what could be given up, each alone, least harm
    first."""
    around, menu, budget = problem.around, problem.menu, plan.budget or 0
    share = 1 - around.reserve
    most = lambda lv, p=problem: max(least(p, lv).values())  # noqa: E731
    lightest = min((lv for _, lv in variants(levers, around.pulls)), key=most)
    rates, rest = around.rates(menu, lightest)
    held, kind, needs = around.held(menu, rates), "all matrices at the smallest candidate", least(problem, lightest)
    try:
        problem.solve(held, smallest(held))
    except Infeasible as e:
        if type(e) is not Infeasible:
            raise
        kind = "the smallest that its planner may choose"
        cap = problem.cap(lightest)
        if around.serve is not None and cap is not None and e.smallest > cap:
            needed = around.serve + e.smallest - cap
            took = f"the smallest model that can be saved ({kind}) takes {show(needed)}"
            message = f"Does not fit: {took}, the serve budget is {show(around.serve)}."
            return Infeasible(message, needed, "Raise --serve-budget, or loosen what the planner must keep to.")
        more = e.smallest - smallest(held)
        needs = {"training": needs["training"] + more} | problem.phases(smallest(menu) + more, lightest, around.least_trained(menu))
    largest = max(needs, key=lambda phase: needs[phase])
    needed, now, total = int(needs[largest] / share) + 1, needs[largest], int(budget * share)
    short = needed - budget
    limit = f"the budget is {show(budget)}" + (f" ({plan.stated})" if plan.stated else "")
    what = "" if largest == "training" else f"for {PHASES.get(largest, (f'the phase {largest}',))[0]}, "
    message = f"Does not fit: {what}the smallest plan ({kind}) needs {show(needed)}, {limit}."
    ways = [((now - most(lightest | change)) / share, text, note) for text, change, note in _ways(plan, levers, lightest, around)]
    rank = around.trained.rank
    if rank > 1 and not around.varied:
        less = replace(around, trained=Trained(around.trained.trained // 2, around.trained.frozen // 2, rank // 2))
        ways.append(((now - most(lightest, replace(problem, around=less))) / share, f"adapter.rank={rank // 2}", "learns less"))
    broken = [phase for phase, need in needs.items() if need > total and phase in PHASES and PHASES[phase][1]]
    for some in [[phase] for phase in broken] + ([broken] if len(broken) > 1 else []):
        without = max(need for phase, need in needs.items() if phase not in some)
        ways.append(
            ((now - without) / share, " ".join(PHASES[p][1] for p in some), f"leaves out {' and '.join(PHASES[p][0] for p in some)}")
        )
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


def buys(plan: Plan, problem: Problem, chosen: Found, asked: Levers) -> list[dict[str, Any]]:
    """What the rest of a budget could buy, each alone, with what the whole job would take then (`peak`) and the average bits; empty unless more
    than a tenth is left over.

    A larger rank, longer rows and larger batches keep the chosen bits; 8 bits and 16 bits are offered to the planner beside its menu.
    """
    total = 0 if plan.budget is None else int(plan.budget * (1 - problem.around.reserve))
    if total - plan.need <= UNUSED * total:
        return []
    found = [*_more_bits(plan, problem, total, asked)]
    for times, note in _more_training(plan, problem, chosen):
        fitting = [(text, need) for text, need in times if need <= total]
        found += [{"change": fitting[-1][0], "peak": fitting[-1][1], "bits": _bits(plan, chosen.picked), "note": note}] if fitting else []
    return found


def _bits(plan: Plan, picked: Mapping[str, Option]) -> float:
    linear = [name for name in picked if not plan.costs[name].get("head")]
    return 8 * sum(picked[k].bytes for k in linear) / sum(math.prod(plan.costs[k]["shape"]) for k in linear)


def _more_bits(plan: Plan, problem: Problem, total: int, asked: Levers) -> Iterator[dict[str, Any]]:
    """Plans that may also take 8 bits, or leave matrices in 16 bits. What these lose is set by rule (4 times less a bit, and nothing)."""
    if not isinstance(problem.planner, Lagrange | MILP | Uniform):
        return
    sets = {name: frozenset(o.spec.format for o in options) for name, options in problem.menu.items() if name not in problem.heads}
    usual = Counter(sets.values()).most_common(1)[0][0]
    free = [name for name, formats in sets.items() if formats == usual]  # others are given
    for format, bits in ((EIGHT, 8), (None, 16)):
        if any((16 if f is None else f.bits) >= bits for f in usual):
            continue
        menu = {
            name: [*options, *(_widened(plan, name, options, format) if name in free else ())] for name, options in problem.menu.items()
        }
        made = joint(replace(problem, menu=menu), total, asked, problem.around.pulls)
        new = [] if made is None else [name for name in free if made.picked[name].spec.format == format]
        if made is None or not new:
            continue
        peak = max(problem.needs(made.picked, made.levers).values())
        change = f"{len(new)} matrices in 16 bits" if format is None else "int8-b128-bf16 among quantization.candidates"
        note = f"quantization.locks.NAME=null, the first {new[0]}" if format is None else f"for {len(new)} matrices"
        yield {"change": change, "peak": peak, "bits": _bits(plan, made.picked), "note": note}


def _widened(plan: Plan, name: str, options: list[Option], format: Format | None) -> Iterator[Option]:
    """The options of the widest format at hand once more in this one."""
    shape = plan.costs[name]["shape"]
    *experts, m, n = shape
    width = max(o.spec.format.bits for o in options if o.spec.format is not None)
    size = 2 * math.prod(shape) if format is None else math.prod(experts) * format.storage_bits(m, n) // 8
    scales = 0 if format is None else math.prod(experts) * cost.overhead(format, m, n)
    for o in options:
        if o.spec.format is not None and o.spec.format.bits == width:
            loss = 0.0 if format is None else o.loss * 4.0 ** (width - format.bits)
            more = {**o.more, "weight": size, "overhead": scales, "serve": o.more["serve"] - o.bytes + size}
            yield Option(replace(o.spec, format=format), size, loss, more)


def _more_training(plan: Plan, problem: Problem, chosen: Found) -> Iterator[tuple[list[tuple[str, int]], str]]:
    """([(line of a recipe, what the job then takes)], note) for a setting, with the chosen bits."""
    around, levers = problem.around, chosen.levers
    need = lambda lv, p=problem: max(p.needs(chosen.picked, lv).values())  # noqa: E731
    adapted = [(o.spec.adapter, plan.costs[name]["shape"]) for name, o in chosen.picked.items() if o.spec.adapter is not None]
    if adapted and not around.varied and all(hasattr(a, "rank") for a, _ in adapted):
        times = []
        for t in TIMES:
            rank = t * around.trained.rank
            if rank > min(min(shape[-2:]) for _, shape in adapted):
                break
            counts = [cost.numbers(of_rank(a, t * a.rank), *shape[-2:]) for a, shape in adapted]
            more = replace(around, trained=Trained(sum(c for c, _ in counts), sum(f for _, f in counts), rank))
            times.append((f"adapter.rank={rank}", need(levers, replace(problem, around=more))))
        yield times, "learns more"
    full = {
        k: v for k, v in levers.items() if k not in ("batches", "lengths", "scored")
    }  # rows of the full length, where others were counted
    lengths = levers.get("lengths") or []
    if not lengths or lengths[-1][1]:
        times = [(f"data.max_length={t * levers['max_length']}", need(full | {"max_length": t * levers["max_length"]})) for t in TIMES]
        yield times, "cuts fewer rows; where the model has the positions"
    b, passes, counted = levers["per_device_train_batch_size"], levers["gradient_accumulation_steps"], levers.get("batches") or {}
    times = []
    for t in TIMES:
        changed = {"per_device_train_batch_size": t * b, "gradient_accumulation_steps": max(passes // t, 1)}
        need_then = need((levers if str(t * b) in counted else full) | changed)
        text = f"training.per_device_train_batch_size={t * b}"
        times.append((text + (f" gradient_accumulation_steps={passes // t}" if passes >= t > 1 and passes > 1 else ""), need_then))
    yield times, "the same steps in fewer passes" if passes > 1 else "more rows a step"
