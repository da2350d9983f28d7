"""What a planner says where nothing fits: which phase breaks the budget, the smallest one that would do, and what could be given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from finebits.plan.allocation import AllocationProblem
from finebits.plan.base import Infeasible, Plan
from finebits.plan.footprint import Footprint
from finebits.plan.knapsack import smallest
from finebits.plan.levers import CHANGED, LEAST_CHUNK, PULLS, Levers, in_words, variants
from finebits.sizes import show

PAIRS = 3  # that are said where no change is enough alone
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


def least(problem: AllocationProblem, levers: Levers) -> dict[str, int]:
    """What every phase takes at least, training first."""
    footprint, menu = problem.footprint, problem.menu
    return {"training": footprint.least(menu, levers)} | problem.phases(smallest(menu), levers, footprint.least_trained(menu))


def infeasible(problem: AllocationProblem, plan: Plan, levers: Levers) -> Infeasible:
    """What to say when nothing fits: the phase that breaks the budget, the smallest budget, and what could be given up, each alone, least harm
    first."""
    footprint, menu, budget = problem.footprint, problem.menu, plan.budget or 0
    share = 1 - footprint.reserve
    most = lambda lv, p=problem: max(least(p, lv).values())  # noqa: E731
    lightest = min((lv for _, lv in variants(levers, footprint.pulls)), key=most)
    rates, rest = footprint.rates(menu, lightest)
    costed, kind, needs = footprint.costed(menu, rates), "all matrices at the smallest candidate", least(problem, lightest)
    try:
        problem.planner(costed, smallest(costed))
    except Infeasible as e:
        if not e.for_bytes:
            raise
        kind = "the smallest that its planner may choose"
        cap = problem.cap(lightest)
        if footprint.serve is not None and cap is not None and e.smallest > cap:
            needed = footprint.serve + e.smallest - cap
            took = f"the smallest model that can be saved ({kind}) takes {show(needed)}"
            message = f"Does not fit: {took}, the serve budget is {show(footprint.serve)}."
            return Infeasible(message, needed, "Raise --serve-budget, or loosen what the planner must keep to.")
        more = e.smallest - smallest(costed)
        needs = {"training": needs["training"] + more} | problem.phases(smallest(menu) + more, lightest, footprint.least_trained(menu))
    largest = max(needs, key=lambda phase: needs[phase])
    needed, now, total = int(needs[largest] / share) + 1, needs[largest], int(budget * share)
    short = needed - budget
    limit = f"the budget is {show(budget)}" + (f" ({plan.stated})" if plan.stated else "")
    what = "" if largest == "training" else f"for {PHASES.get(largest, (f'the phase {largest}',))[0]}, "
    message = f"Does not fit: {what}the smallest plan ({kind}) needs {show(needed)}, {limit}."
    changes = list(_ways(plan, levers, lightest, footprint))
    ways = [((now - most(replace(lightest, **change))) / share, text, note) for text, change, note in changes]
    rank = footprint.trained.rank
    if rank > 1 and not footprint.varied:
        t = footprint.trained
        less = replace(footprint, trained=replace(t, trained=t.trained // 2, frozen=t.frozen // 2, rank=rank // 2, again=t.again // 2))
        ways.append(((now - most(lightest, replace(problem, footprint=less))) / share, f"adapter.rank={rank // 2}", "learns less"))
    broken = [phase for phase, need in needs.items() if need > total and phase in PHASES and PHASES[phase][1]]
    for some in [[phase] for phase in broken] + ([broken] if len(broken) > 1 else []):
        without = max(need for phase, need in needs.items() if phase not in some)
        ways.append(
            ((now - without) / share, " ".join(PHASES[p][1] for p in some), f"leaves out {' and '.join(PHASES[p][0] for p in some)}")
        )
    two = [] if any(saved >= short for saved, _, _ in ways) else _two(changes, lambda both: (now - most(replace(lightest, **both))) / share)
    fit = sorted((way for way in two if way[0] >= short), key=lambda way: way[0])[:PAIRS]
    lines = [f"  budget.memory={-(-needed // 2**20)}MiB".ljust(50) + "fits"]
    for saved, text, note in sorted(ways, key=lambda w: w[0] < short):  # those that are enough come first, else in the order above
        if saved > 0:
            lines.append(f"  {text}".ljust(50) + f"saves {show(saved):<11}" + ("fits" if saved >= short else "    ") + f"  {note}".rstrip())
    if fit:
        lines.append("Two of them together:")
        lines += [f"  {text}".ljust(50) + f"saves {show(saved):<11}fits" for saved, text in fit]
        lines.append("Or:")
    lines.append("  a smaller base model".ljust(50) + "finebits plan --what-fits BUDGET MODEL MODEL compares")
    return Infeasible(message, needed, "What could be given up, each alone:\n" + "\n".join(lines))


def _two(changes: list[tuple[str, dict[str, Any], str]], saved: Callable[[dict[str, Any]], float]) -> list[tuple[float, str]]:
    """What every two changes of different levers save together."""
    pairs = [(one, other) for i, one in enumerate(changes) for other in changes[i + 1 :] if not one[1].keys() & other[1].keys()]
    return [(saved(a | b), f"{first} {second}") for (first, a, _), (second, b, _) in pairs]


def _ways(plan: Plan, asked: Levers, lightest: Levers, footprint: Footprint) -> Iterator[tuple[str, dict[str, Any], str]]:
    free = min((lv for _, lv in variants(asked, PULLS)), key=footprint.rest)
    if set(footprint.pulls) != set(PULLS):
        nats = plan.solver.get("objective") in ("fisher", "kl")  # a head of its own has no price in nats
        text = f"budget.levers=[{','.join(p for p in PULLS if p != 'head')}]" if nats else "budget.levers=all"
        yield text, {k: getattr(free, k) for k in CHANGED}, f"same training, slower: {in_words(free)}"
    b, passes = lightest.per_device_train_batch_size, lightest.gradient_accumulation_steps
    if b % (2 * (lightest.together or 1)) == 0:
        text = f"training.per_device_train_batch_size={b // 2}"
        yield text, {"per_device_train_batch_size": b // 2}, f"with gradient_accumulation_steps={2 * passes} the same steps"
    if not lightest.gradient_checkpointing:
        yield "training.gradient_checkpointing=true", {"gradient_checkpointing": True}, "about a third slower"
    if lightest.loss_chunk > LEAST_CHUNK:
        chunk = max(lightest.loss_chunk // 4, LEAST_CHUNK)
        yield f"training.loss_chunk={chunk}", {"loss_chunk": chunk}, "the same loss"
    if lightest.max_length > 64:
        half, lengths = lightest.max_length // 2, footprint.counted.lengths or []
        cut, rows = sum(n for upto, n in lengths if upto > half), sum(n for _, n in lengths)
        note = f"cuts {100 * cut / rows:.1f} % of the rows" if rows else "cuts longer rows"
        yield f"data.max_length={half}", {"max_length": half}, note
