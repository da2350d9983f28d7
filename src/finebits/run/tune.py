"""A run from its saved start: trained, saved, scored."""

from __future__ import annotations

import gc
import json
from typing import Any

from finebits import runfolder
from finebits.files import write_json
from finebits.process import first
from finebits.recipe import Recipe
from finebits.run.part import Part, plan_for


def arguments_of(recipe: Recipe, plan: Any) -> tuple[dict[str, Any], int]:
    """(arguments of the trainer, tokens a chunk of the loss): the recipe's, and the levers as the plan has set them."""
    from finebits.plan.levers import TRAINING

    wanted = recipe.training.model_dump() | {k: getattr(plan.levers, k) for k in TRAINING}
    for key in OURS:
        wanted.pop(key)
    wanted["per_device_eval_batch_size"] = recipe.evaluation.per_device_eval_batch_size
    if not evaluates(recipe):
        wanted.pop("metric_for_best_model")
    return wanted, wanted.pop("loss_chunk")


OURS = (
    "loss",
    "effective_batch_size",
    "early_stopping_patience",
    "early_stopping_threshold",
)  # keys of training that are no arguments of the trainer


def evaluates(recipe: Recipe) -> bool:
    """Is the held-out loss taken while training?"""
    return recipe.training.eval_strategy != "no" or recipe.training.eval_on_start


def patience(recipe: Recipe) -> tuple[int, float] | None:
    """After how many evaluations without a gain of how much a run stops; None for never."""
    t = recipe.training
    return None if t.early_stopping_patience is None else (t.early_stopping_patience, t.early_stopping_threshold)


def fit(part: Part, plan: Any, resume: bool = False) -> Any:
    """A run from its saved start (or from the plan, where none was saved): loaded, trained, saved. The model."""
    import finebits as fb
    from finebits.interop.hf import load_with
    from finebits.interop.sharding import laid
    from finebits.interop.trainer import Interrupted, checkpoints, trainer

    assert part.examples is not None
    recipe, started = part.recipe, part.run / runfolder.STARTED
    load = lambda: load_with(part.processor, started) if started.exists() else fb.load_planned(plan)[0]  # noqa: E731
    part.phase("loading")
    with part.meter.phase("load"):
        model = load()
    arguments, loss_chunk = arguments_of(recipe, plan)
    objective = recipe.objective_value()
    held = part.batches if objective is None else part.material.held
    examples: Any = part.examples if objective is None else part.material.train
    part.phase("training")
    with part.meter.phase("train"):
        engine = trainer(
            model,
            part.processor,
            examples,
            part.run / runfolder.CHECKPOINTS,
            arguments,
            recipe.rule_values(),
            loss_chunk=loss_chunk,
            events=part.run / runfolder.EVENTS,
            watch=part.progress.event,
            held=held if evaluates(recipe) else (),
            objective=objective,
            patience=patience(recipe),
        )
        last = checkpoints(part.run / runfolder.CHECKPOINTS)[-1:] if resume else []
        engine.train(resume_from_checkpoint=str(last[0]) if last else None)
    if engine.moments.stop:
        raise Interrupted(f"stopped at step {engine.state.global_step}; go on with --resume")
    trained = None if engine.shards is None else engine.whole()
    del engine
    gc.collect()
    if not first():
        return model
    if trained is not None:  # it goes into a model that is whole
        del model
        model = laid(load(), trained)
    part.phase("saving")
    with part.meter.phase("save"):
        fb.save(model, part.run / runfolder.MODEL)
    return model


def tune(part: Part, resume: bool = False) -> None:
    """One run from its saved start: train, save, score."""
    from finebits.meter import MALLOC, relax, settings

    plan = plan_for(part)
    model = fit(part, plan, resume)
    if not first():
        return  # what is left is done once
    relax()
    part.scores(model, runfolder.SCORES, "scoring the tuned model")
    if part.own and part.recipe.evaluation.samples:
        part.phase("samples")
        asked = part.material.prompts
        file = part.folder.run(runfolder.FULL) / runfolder.SAMPLES
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else [None] * len(asked)
        after = part.samples(model)
        samples = [
            {"prompt": p.text, "reference": p.reference, "before": b, "after": a} for p, b, a in zip(asked, before, after, strict=True)
        ]
        write_json(part.folder / runfolder.SAMPLES, samples)
    if settings() == MALLOC:
        write_json(part.run / runfolder.MEMORY, measured(part, plan, model) | {"settings": settings()})


def measured(part: Part, plan: Any, model: Any) -> dict[str, Any]:
    """memory.json: what was planned and what was measured."""
    from finebits.build import weighted
    from finebits.qtensor import nbytes

    before = part.run / runfolder.PEAKS
    peaks = part.meter.peaks | {}
    for file in (part.folder.run(runfolder.FULL) / runfolder.PEAKS, before):  # quantizing took more than loading what was saved
        peaks |= json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {
        "schema": "finebits.memory/1",
        "planned": plan.memory,
        "planned_peak": plan.peak,
        "measured_peak": peaks.pop("train"),
        "baseline": part.meter.baseline,
        "stored": {
            "planned": sum(cost["bytes"] for cost in plan.costs.values()),
            "measured": sum(nbytes(m.weight) for m in weighted(model).values()),
        },
        "rows": [{"phase": k, "planned": plan.rows.get(k), "measured": v} for k, v in peaks.items()],
    }
