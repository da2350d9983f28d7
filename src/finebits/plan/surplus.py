"""What the rest of a budget could buy, where much of it is left over."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finebits.adapters.base import of_rank
from finebits.formats.base import Format
from finebits.formats.int import Int
from finebits.plan import cost
from finebits.plan.allocation import Allocation, AllocationProblem, allocate
from finebits.plan.base import Option, Plan, at_end
from finebits.plan.levers import Counted, Levers

UNUSED = 0.1  # of what a plan may spend: more is worth a word
TIMES = (2, 4, 8)  # how much of a setting the rest may buy
EIGHT = Int(8, block=128, scale="bf16")


def buys(plan: Plan, problem: AllocationProblem, chosen: Allocation, asked: Levers) -> list[dict[str, Any]]:
    """What the rest of a budget could buy, each alone, with what the whole job would take then (`peak`) and the average bits; empty unless more
    than a tenth is left over.

    A larger rank, longer rows and larger batches keep the chosen bits; 8 bits and 16 bits are offered to the planner beside its menu.
    """
    total = 0 if plan.budget is None else int(plan.budget * (1 - problem.footprint.reserve))
    if total - plan.need <= UNUSED * total:
        return []
    purchases = [*_more_bits(plan, problem, total, asked)]
    for times, note in _more_training(plan, problem, chosen):
        fitting = [(text, need) for text, need in times if need <= total]
        if fitting:
            change, peak = fitting[-1]
            purchases.append({"change": change, "peak": peak, "bits": _bits(plan, chosen.picked), "note": note})
    return purchases


def _bits(plan: Plan, picked: Mapping[str, Option]) -> float:
    linear = [name for name in picked if at_end(plan.costs[name]) is None]
    return 8 * sum(picked[k].bytes for k in linear) / sum(math.prod(plan.costs[k]["shape"]) for k in linear)


def _more_bits(plan: Plan, problem: AllocationProblem, total: int, asked: Levers) -> Iterator[dict[str, Any]]:
    """Plans that may also take 8 bits, or leave matrices in 16 bits. What these lose is set by rule (4 times less a bit, and nothing)."""
    if not problem.planner.widens:
        return
    sets = {name: frozenset(o.spec.format for o in options) for name, options in problem.menu.items() if name not in problem.ends}
    usual = Counter(sets.values()).most_common(1)[0][0]
    free = [name for name, formats in sets.items() if formats == usual]  # others are given
    for format, bits in ((EIGHT, 8), (None, 16)):
        if any((16 if f is None else f.bits) >= bits for f in usual):
            continue
        menu = {
            name: [*options, *(_widened(plan, name, options, format) if name in free else ())] for name, options in problem.menu.items()
        }
        wider = allocate(replace(problem, menu=menu), total, asked, problem.footprint.pulls)
        new = [] if wider is None else [name for name in free if wider.picked[name].spec.format == format]
        if wider is None or not new:
            continue
        peak = max(problem.needs(wider.picked, wider.levers).values())
        change = f"{len(new)} matrices in 16 bits" if format is None else "int8-b128-bf16 among quantization.candidates"
        note = f"quantization.locks.NAME=null, the first {new[0]}" if format is None else f"for {len(new)} matrices"
        yield {"change": change, "peak": peak, "bits": _bits(plan, wider.picked), "note": note}


def _widened(plan: Plan, name: str, options: Sequence[Option], format: Format | None) -> Iterator[Option]:
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


def _more_training(plan: Plan, problem: AllocationProblem, chosen: Allocation) -> Iterator[tuple[list[tuple[str, int]], str]]:
    """([(line of a recipe, what the job then takes)], note) for a setting, with the chosen bits."""
    footprint, levers = problem.footprint, chosen.levers
    need = lambda lv, p=problem: max(p.needs(chosen.picked, lv).values())  # noqa: E731
    adapted = [(o.spec.adapter, tuple(plan.costs[name]["shape"])) for name, o in chosen.picked.items() if o.spec.adapter is not None]
    if adapted and not footprint.varied and all(a.rank for a, _ in adapted):
        times = []
        for t in TIMES:
            rank = t * footprint.trained.rank
            if rank > min(min(shape[-2:]) for _, shape in adapted):
                break
            grown = [(of_rank(a, t * a.rank), shape) for a, shape in adapted]
            now, (before, still), (after, frozen) = footprint.trained, cost.together(adapted), cost.together(grown)
            words = (t - 1) * now.words if any(a.over == "matrix" for a in plan.over.values()) else 0  # tables under the same adapter
            numbers = {"trained": now.trained - before + after + words, "frozen": now.frozen - still + frozen, "words": now.words + words}
            more = replace(footprint, trained=replace(now, **numbers, rank=rank, again=cost.again(grown)))
            times.append((f"adapter.rank={rank}", need(levers, replace(problem, footprint=more))))
        yield times, "learns more"
    uncounted = Counted(runtime=footprint.counted.runtime, routed=footprint.counted.routed)
    full = replace(problem, footprint=replace(footprint, counted=uncounted))  # rows of the full length
    lengths, long = footprint.counted.lengths or [], levers.max_length
    if not lengths or lengths[-1][1]:
        times = [(f"data.max_length={t * long}", need(replace(levers, max_length=t * long), full)) for t in TIMES]
        yield times, "cuts fewer rows; where the model has the positions"
    b, passes = levers.per_device_train_batch_size, levers.gradient_accumulation_steps
    times = []
    for t in TIMES:
        changed = replace(levers, per_device_train_batch_size=t * b, gradient_accumulation_steps=max(passes // t, 1))
        need_then = need(changed, problem if footprint.counted.of(t * b) else full)
        text = f"training.per_device_train_batch_size={t * b}"
        times.append((text + (f" gradient_accumulation_steps={passes // t}" if passes >= t > 1 and passes > 1 else ""), need_then))
    yield times, "the same steps in fewer passes" if passes > 1 else "more rows a step"
