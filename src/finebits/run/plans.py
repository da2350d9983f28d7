"""The plan of a job: made, calibrated by a probe, or one that was made before and still fits."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from finebits import sizes
from finebits.errors import Invalid
from finebits.files import write_text
from finebits.plan.base import Plan
from finebits.progress import Progress
from finebits.recipe import Recipe
from finebits.recipe.settings import Settings
from finebits.report.cells import short
from finebits.run.material import Material
from finebits.run.source import Subject
from finebits.run.stage import Stage, work
from finebits.runfolder import PLAN, PROBE, RECIPE, RunFolder

PROBES = 3  # at most, until the planned size of a batch is the one that was probed


def priced(recipe: Recipe, rows: tuple[Any, Any] | None, pareto: int = 0, fast: bool = False) -> Plan:
    """A new plan for rows to train on and rows held out, tokenized or not. It is not written. Raises CannotHold where a target of the recipe's
    export cannot hold one of the candidates, an adapter, or what an adapter rescales."""
    from finebits.export import base as exports
    from finebits.interop.planning import plan_model
    from finebits.interop.selecting import meta

    how = recipe.requantize_value()
    as_trained = [to for to in recipe.export.to if to not in exports.rounded_anew(recipe.export.to, how)]
    for format in filter(None, recipe.formats()):
        exports.check({f"the candidate {short(format)}": (format, exports.SHAPE)}, as_trained)
    named = {f"adapter.choose.{i}": adapter for i, (adapter, _) in enumerate(recipe.choices())}
    if not named and recipe.adapter.folder is None and (own := recipe.adapter_value()).over == "matrix":
        named["its matrices"] = own  # so that nothing is priced in vain
    exports.check_adapters(named, (), as_trained)
    data, held = rows or (None, None)
    said = recipe.model.model_name_or_path, recipe.budget.memory, data, Settings.of(recipe), Progress("pricing")
    plan = plan_model(*said, fast=fast, pareto=pareto, held_out=held)
    exports.check_adapters(*exports.adapters_of(plan), as_trained)
    if how is not None:
        exports.check_rounded_anew(plan, exports.rounded_anew(recipe.export.to, how), how)
    shell = lambda: meta(Subject.of(recipe, config_only=fast).folder)  # noqa: E731
    if any(adapter.over == "attention" for adapter in plan.over.values()):
        exports.check_prefixes(as_trained, shell())
    if exports.rescales(plan):
        notices = exports.check_folds(plan, as_trained, shell())
        plan = replace(plan, notices=(*plan.notices, *notices))
    return plan


def probed(recipe: Recipe, made: Plan, material: Material, pareto: int = 0) -> tuple[Plan, dict[str, Any]]:
    """The plan again, calibrated, and what was measured: its worst batches are trained once in a process of their own under the measured
    settings, and what the process holds beside tensors is no guess any more. Load, eval and save peaks become the measured ones. Where another
    size of batch is planned then, that one is probed too."""
    from finebits.plan.solve import again

    if made.levers.device != "cpu":
        raise Invalid("--probe measures the memory of a process, and the plan is for a CUDA device: plan without it")
    for _ in range(PROBES):
        found = _probe(recipe, made, material)
        new = again(replace(made, counted=replace(made.counted, runtime=found["runtime"])), pareto=pareto)
        if new.levers.per_device_train_batch_size == made.levers.per_device_train_batch_size:
            break
        made = new
    else:
        new = replace(
            new, notices=(*new.notices, f"every one of {PROBES} probes led to another size of batch: the last one was not probed")
        )
    stored = ("linear weights", "head", "embeddings", "adapters", "frozen factors")
    moved = sum(new.memory[k] - made.memory[k] for k in stored)
    rows = new.rows | {k: v + moved for k, v in found["peaks"].items() if k != "train"}
    new = replace(new, rows=rows, solver=new.solver | {"probed": {"planned": found["planned"], "measured": found["peaks"]["train"]}})
    return new, found


def _probe(recipe: Recipe, made: Plan, material: Material) -> dict[str, Any]:
    """What a probe of a plan has measured."""
    with tempfile.TemporaryDirectory(prefix="finebits-probe-") as scratch:  # it is no run of the job
        folder = RunFolder(scratch)
        write_text(folder / RECIPE, recipe.to_yaml())
        made.save(folder / PLAN)
        material.save(folder)
        work(folder, Stage("probe", "probe", measured=True))
        return json.loads((folder / PROBE).read_text(encoding="utf-8"))


def followed(recipe: Recipe, model: Subject, material: Material, given: Path | None, own: Path | None) -> Plan:
    """The plan of a run: its `own` if it goes on, else the one that is `given`, else a new one. Raises PlanDrift (exit code 3) where a plan was
    made for another model, a larger budget or shorter rows than the recipe's, and CannotHold where a target of its export cannot hold it."""
    from finebits.export import base as exports
    from finebits.interop.configs import raw_config

    plans = [(path, Plan.load(path)) for path in (given, own) if path is not None]
    plan = _kept(recipe, plans, model) if plans else priced(recipe, (material.train, material.held))
    exports.check_all(plan, recipe.export.to, recipe.requantize_value(), raw_config(model.folder))
    return plan


def _kept(recipe: Recipe, plans: list[tuple[Path, Plan]], model: Subject) -> Plan:
    """The first of these plans, which must be one plan, and of this recipe."""
    from finebits.interop.hf import PlanDrift, fingerprint

    (path, plan), *rest = plans
    if rest and rest[0][1].hash != plan.hash:
        raise PlanDrift(
            f"{path} is not the plan that the run in {recipe.output_dir} follows: --resume goes on with its own, leave --plan out"
        )
    name, mark = recipe.model.model_name_or_path, fingerprint(model.folder)
    if mark != plan.model_hash if plan.model_hash else plan.model != name:
        raise PlanDrift(
            f"{path} was made for {plan.model} ({plan.model_hash or 'no fingerprint'}), and the recipe's model is {name} ({mark}): plan again"
        )
    usable, asked = recipe.budget.usable, model.task.longest(recipe.data.max_length)
    if usable is not None and plan.need > usable:
        raise PlanDrift(
            f"{path} needs {sizes.show(plan.need)} and the recipe's budget leaves {sizes.show(usable)}: plan again, or raise budget.memory"
        )
    if plan.levers.max_length < asked:
        raise PlanDrift(
            f"{path} was made for rows of {plan.levers.max_length} tokens and the recipe's data.max_length is {asked}: plan again"
        )
    return plan
