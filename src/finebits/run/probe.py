"""The memory of a process, seen on the worst batches of a run."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finebits import runfolder
from finebits.errors import Failed
from finebits.files import write_json
from finebits.run.part import Part
from finebits.run.tune import arguments_of

if TYPE_CHECKING:
    from finebits.plan.base import Plan
    from finebits.rules.base import Rule

PROBED = 8  # batches at most


def probe(part: Part) -> None:
    """The worst batches of the run, trained, scored and saved once, to see what the process holds beside tensors. Writes probe.json."""
    import finebits as fb
    from finebits.evaluate.heldout import score
    from finebits.init.zeros import Zeros
    from finebits.interop.feeding import FixedOrder
    from finebits.interop.trainer import trainer
    from finebits.meter import settings
    from finebits.plan import memory

    assert part.examples is not None

    plan = part.plan.with_start(Zeros())  # how an adapter starts does not change what it holds
    part.phase("loading")
    with part.meter.phase("load"):
        model, tokenizer = fb.load_planned(plan)
    arguments, loss_chunk = arguments_of(part.recipe, plan)
    batches = worst(part, arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"])
    passes = min(arguments["gradient_accumulation_steps"], 2)  # from two on, gradients are there when the loss is computed
    rows = [r for batch in batches for r in batch * passes]
    arguments |= {"max_steps": len(batches), "gradient_accumulation_steps": passes, "report_to": "none"}
    arguments |= {"save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}
    part.phase("probing")
    with part.meter.phase("train"), tempfile.TemporaryDirectory() as folder:
        watch = part.progress.event
        rules = part.recipe.rule_values()
        objective = part.recipe.objective_value()
        examples: Any = part.examples if objective is None else part.material.train
        engine = trainer(model, tokenizer, examples, folder, arguments, rules, loss_chunk=loss_chunk, watch=watch, objective=objective)
        engine.data_order = FixedOrder(rows)
        engine.train()
    del engine
    gc.collect()
    longest = part.batches[:1]
    with part.meter.phase("eval"):
        score(model, longest, chunk=loss_chunk)
    with part.meter.phase("save"), tempfile.TemporaryDirectory() as folder:
        fb.save(model, Path(folder) / runfolder.MODEL)
    peaks = part.meter.peaks
    if peaks["train"] is None:
        raise Failed("this system does not tell the high-water mark of a process, so there is nothing to probe: plan without --probe")
    planned = part.plan.peak - unmet(part.plan, rules, part.recipe.training.max_steps, len(batches))
    runtime = memory.runtime(part.plan.workload) + peaks["train"] - planned
    result = {"schema": "finebits.probe/1", "plan": part.plan.hash, "planned": planned, "peaks": peaks, "runtime": max(runtime, 0)}
    write_json(part.folder / runfolder.PROBE, result | {"steps": len(batches), "settings": settings()})


def unmet(plan: Plan, rules: Sequence[Rule], run: int, steps: int) -> int:
    """Bytes that rules hold in steps of the run (of so many, of epochs where that is not above 0) that a probe of fewer does not come to."""
    from finebits.rules.base import held

    over = [(s.adapter, tuple(plan.costs[name]["shape"][-2:])) for name, s in plan.modules.items() if s.adapter is not None]
    return held(rules, over, steps=run if run > 0 else None)[0] - held(rules, over, steps=steps)[0]


def worst(part: Part, size: int, passes: int) -> list[list[int]]:
    """The batches that a probe takes, as row numbers, out of those that the run meets and in its order: the first, after which the optimizer has
    its state, those after the first step that no other exceeds, and the first of every padded width, for which the matrix library keeps code
    from then on."""
    from finebits.plan import memory
    from finebits.train import met

    long, labelled = [part.task.tokens(n) for n in part.units.lengths], part.units.labelled
    t = part.recipe.training
    objective = part.recipe.objective_value()
    batches = met(long, size, t.seed, passes, t.max_steps, t.num_train_epochs, 1 if objective is None else objective.together)
    batches = [b for b in batches if len(b) == size] or [[i % len(long) for i in range(size)]]
    weigh = lambda b: (part.plan.levers.padded(max(long[r] for r in b)), sum(labelled[r] for r in b))  # noqa: E731
    pairs = [weigh(b) for b in batches]
    later = pairs[passes:]
    places = [0, *(passes + i for i in list(memory.worst(later).values())[-PROBED + 2 :])] if later else [0]
    widths = sorted({w for w, _ in pairs} - {pairs[i][0] for i in places}, reverse=True)
    places += [next(i for i, p in enumerate(pairs) if p[0] == w) for w in widths[: PROBED - len(places)]]
    return [batches[i] for i in sorted(places)]
