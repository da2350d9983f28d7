"""The main job, verb by verb. Each verb reads the recipe and what earlier verbs wrote to output_dir.

Whatever holds a model runs in a process of its own (finebits.worker), under stated allocator settings, so that its memory can be measured
and nothing of one run is left in the next.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finebits import process, sizes
from finebits.data.check import Check, require
from finebits.data.check import check as look
from finebits.data.rows import Rows
from finebits.errors import Failed, Invalid
from finebits.files import Occupied, ours, write_text
from finebits.meter import HUGE, MALLOC
from finebits.plan.base import Plan
from finebits.progress import Progress, elsewhere
from finebits.recipe import Recipe
from finebits.recipe.rows import rows_of
from finebits.recipe.settings import Settings, device
from finebits.report.text import evaluation_table
from finebits.runfolder import (
    DATA,
    EVALUATION,
    EXPORT,
    EXPORTED,
    FULL,
    HEAD,
    MARKS,
    PAGE,
    PEER,
    PLAN,
    PROBE,
    RECIPE,
    SCORES,
    START_SCORES,
    RunFolder,
    digest,
)

NAMES = {
    "full": ("full precision, untuned", "start"),
    "zeros_start": ("QLoRA start (zeros), untuned", "start"),
    "zeros": ("QLoRA start (zeros), tuned", "tuned"),
    "lora16": ("16-bit LoRA, tuned", "tuned"),
    "qlora_start": ("QLoRA (PEFT, bitsandbytes), untuned", "start"),
    "qlora": ("QLoRA (PEFT, bitsandbytes), tuned", "tuned"),
    "export": ("exported adapter, stock libraries", "export"),
}


class WorkerFailed(Failed):
    """A process of the job failed; its own message was shown."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def label(key: str) -> tuple[str, str]:
    """Name and stage of an evaluation entry."""
    if key in NAMES:
        return NAMES[key]
    name = key.removesuffix("_start")
    return (f"{name} start, untuned", "start") if key.endswith("_start") else (f"{name} start, tuned", "tuned")


def main_run(recipe: Recipe) -> str:
    """The name of the recipe's own run: how its adapter starts."""
    return type(recipe.init_value()).__module__.rsplit(".", 1)[-1]


def runs(recipe: Recipe) -> list[str]:
    """The runs of a recipe, its own first."""
    return [main_run(recipe), *(c for c in recipe.evaluation.compare if c != main_run(recipe))]


def plan(recipe: Recipe, out: Path | None = None, pareto: int = 0, fast: bool = False, probed: bool = False) -> Plan:
    """Choose the bits; write the plan, beside a run that has its own. `pareto` also solves that many budgets from the smallest that fits
    upwards; `probed` trains the worst batches once and plans again with what was measured."""
    folder = RunFolder(recipe.output_dir)
    if out is not None:
        ours(out, MARKS[PLAN])
    else:
        folder.ours(PLAN, PROBE)
    made, found = priced(recipe, pareto, fast), None
    if probed:
        made, found = probe(recipe, made, pareto)
    made.save(out or folder.plan_path(made))
    if found is not None and not folder.holds():
        write_text(folder / PROBE, json.dumps(found, indent=1) + "\n")
    return made


def priced(recipe: Recipe, pareto: int = 0, fast: bool = False) -> Plan:
    """A plan, not written."""
    from finebits.interop.planning import plan_model

    data, held = rows_of(recipe) if recipe.data.datasets and not fast else (None, None)
    said = recipe.model.model_name_or_path, recipe.budget.memory, data, Settings.of(recipe), Progress("pricing")
    return plan_model(*said, fast=fast, pareto=pareto, held_out=held)


def probe(recipe: Recipe, made: Plan, pareto: int = 0) -> tuple[Plan, dict[str, Any]]:
    """The plan again, calibrated, and what was measured: its worst batches are trained once in a process of their own under the measured
    settings, and what the process holds beside tensors is no guess any more. Load, eval and save peaks become the measured ones."""
    from finebits.plan.whole import again

    if made.levers.get("device", device(recipe)) != "cpu":
        raise Invalid("--probe measures the memory of a process, and the plan is for a CUDA device: plan without it")
    with tempfile.TemporaryDirectory(prefix="finebits-probe-") as scratch:  # it is no run of the job
        folder = RunFolder(scratch)
        write_text(folder / RECIPE, recipe.to_yaml())
        made.save(folder / PLAN)
        work(folder, "probe", measured=True)
        found = json.loads((folder / PROBE).read_text())
    new = again(made, pareto=pareto, runtime=found["runtime"])
    stored = ("linear weights", "head", "adapters", "frozen factors")
    moved = sum(new.memory[k] - made.memory[k] for k in stored)
    rows = new.rows | {k: v + moved for k, v in found["peaks"].items() if k != "train"}
    new = replace(new, rows=rows, solver=new.solver | {"probed": {"planned": found["planned"], "measured": found["peaks"]["train"]}})
    return new, found


def what_fits(recipe: Recipe, models: Sequence[str], fast: bool = False) -> list[Any]:
    """What each model could be within the recipe's budget and settings, the best buy first: rows of finebits.plan.compare."""
    from finebits.interop.planning import compare

    assert recipe.budget.memory is not None
    data = rows_of(recipe)[0] if recipe.data.datasets and not fast else None
    return compare(recipe.budget.memory, models, Settings.of(recipe), Progress("pricing"), fast, data)


def check(recipe: Recipe) -> Check:
    """The data gate over training and held-out rows. Writes data.json, where no run has its own; raises GateFailed (exit code 4)."""
    from finebits.interop.hf import folder_of
    from finebits.interop.tokenizer import limits_of, tokenizer_of

    model = folder_of(recipe.model.model_name_or_path, recipe.model.model_revision)
    tokenizer = tokenizer_of(model)
    limits = limits_of(model, tokenizer)
    found: Check | None = None
    for rows in rows_of(recipe):
        one = look(rows, tokenizer, recipe.data.max_length, recipe.data.assistant_only_loss, limits)
        if found is None:
            found, folder = one, RunFolder(recipe.output_dir)
            folder.ours(DATA)
            if not folder.holds():
                write_text(folder / DATA, json.dumps(one.to_json()) + "\n")
        require(one)
    assert found is not None
    return found


def train(
    recipe: Recipe,
    plan_path: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    max_steps: int | None = None,
    overwrite: bool = False,
) -> None:
    """The whole way: gate, plan, every start, every run, evaluation, export, verification, page. `max_steps` cuts the runs short. A run that is
    in the folder is gone on with (`resume`), also further than it was to go, or cleared away (`overwrite`), or set aside if it is finished;
    else the folder is refused."""
    begun = time.monotonic()
    folder, say = RunFolder(recipe.output_dir), Progress("").say
    if max_steps is not None:
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": max_steps})})
    with folder.locked():
        rows = hash_of(rows_of(recipe))
        if not folder.claim(recorded(recipe), rows, resume, overwrite):
            say(f"{folder} holds this run, finished: nothing is left to do")
            return
        found = check(recipe)
        if "qlora" in recipe.evaluation.compare:
            from finebits.interop import peers

            peers.check()
        made = followed(recipe, plan_path, folder / PLAN if resume else None)
        say(made.summary().replace("\n", "\n "))
        if overwrite and not dry_run:
            folder.clear()
        elif not resume and not dry_run and folder.holds():
            say(f"the finished run that was in {folder} is in {folder.set_aside()} now")
        if not (dry_run and folder.holds()):
            write_text(folder / RECIPE, HEAD + recipe.to_yaml())
            write_text(folder / DATA, json.dumps(found.to_json()) + "\n")
            made.save(folder / PLAN)
        if dry_run:
            return
        parts = made_by(recipe, made, rows)
        folder.begin(recorded(recipe), rows, made, parts)

        own, failed = main_run(recipe), dict[str, WorkerFailed]()

        def make(part: str, name: str, **options: Any) -> None:
            """Make a part that is not there. A comparison that fails costs nothing but itself."""
            if folder.has(part, parts[part]) or name in failed:
                return
            try:
                work(folder, name, **options)
            except WorkerFailed as e:
                if name in (own, FULL):
                    raise
                failed[name] = e
                say(f"{e}; the job goes on without it")
            else:
                folder.done(part, parts[part])

        left = [name for name in runs(recipe) if not folder.has(name, parts[name])]
        if recipe.evaluation.full_precision:
            make(FULL, FULL)
        for name in left:
            if name != "lora16":
                make(f"{name}/start", name, measured=name == own, start=True)
        if left:
            say(evaluation_table(_evaluate(recipe, folder)).replace("\n", "\n "))
            say(f"starts measured after {clock(time.monotonic() - begun)}")
        for name in left:
            make(name, name, measured=name == own, resume=resume)
        if recipe.export.to:
            _export(recipe, folder, list(recipe.export.to), recipe.export.verify, overwrite)
        say(evaluation_table(_evaluate(recipe, folder)).replace("\n", "\n "))
        say(f"all of it after {clock(time.monotonic() - begun)}")
        say(f"wrote {report(folder.path)}")
        for e in failed.values():
            raise WorkerFailed(f"{e}; all else is there, and --resume tries it again", e.code)
        folder.finish()


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60} min {int(seconds) % 60} s" if seconds >= 60 else f"{seconds:.0f} s"


def recorded(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a run's record holds it."""
    return json.loads(json.dumps(recipe.model_dump(mode="json")))


def hash_of(rows: Sequence[Rows]) -> str:
    """What training and held-out rows say, in sixteen hexadecimal digits."""
    return digest(*([[r.messages, r.text] for r in part] for part in rows))


def followed(recipe: Recipe, given: Path | None, own: Path | None) -> Plan:
    """The plan of a run: its `own` if it goes on, else the one that is `given`, else a new one. Raises PlanDrift (exit code 3) where a plan was
    made for another model, a larger budget or shorter rows than the recipe's."""
    from finebits.interop.hf import PlanDrift, fingerprint, folder_of

    plans = [(path, Plan.load(path)) for path in (given, own) if path is not None]
    if not plans:
        return priced(recipe)
    (path, made), *rest = plans
    if rest and rest[0][1].hash != made.hash:
        raise PlanDrift(
            f"{path} is not the plan that the run in {recipe.output_dir} follows: --resume goes on with its own, leave --plan out"
        )
    name = recipe.model.model_name_or_path
    found = fingerprint(folder_of(name, recipe.model.model_revision))
    if found != made.model_hash if made.model_hash else made.model != name:
        raise PlanDrift(
            f"{path} was made for {made.model} ({made.model_hash or 'no fingerprint'}), and the recipe's model is {name} ({found}): plan again"
        )
    usable, length = recipe.budget.usable, made.levers.get("max_length", recipe.data.max_length)
    if usable is not None and made.need > usable:
        raise PlanDrift(
            f"{path} needs {sizes.show(made.need)} and the recipe's budget leaves {sizes.show(usable)}: plan again, or raise budget.memory"
        )
    if length < recipe.data.max_length:
        raise PlanDrift(
            f"{path} was made for rows of {length} tokens and the recipe's data.max_length is {recipe.data.max_length}: plan again"
        )
    return made


def made_by(recipe: Recipe, plan: Plan, rows: str) -> dict[str, str]:
    """Every part of the recipe's job, and a hash of all that it depends on."""
    said = recorded(recipe)
    data = {k: said["data"][k] for k in ("max_length", "assistant_only_loss")}
    evaluation = {k: v for k, v in said["evaluation"].items() if k != "compare"}
    parts = {FULL: digest(FULL, plan.hash, rows, data, evaluation)}
    for name in runs(recipe):
        parts[f"{name}/start"] = digest("start", name, parts[FULL])
        parts[name] = digest("tuned", parts[f"{name}/start"], said["training"], said["rules"])
    parts[EXPORT] = digest(EXPORT, parts[main_run(recipe)])
    return parts


def of_run(recipe: Recipe, folder: RunFolder) -> dict[str, str]:
    """The parts of the run in a folder, which must be this recipe's. Raises ValueError where there is none, or another's."""
    held = folder.record()
    if not held:
        raise Invalid(f"{folder} holds no run yet: run finebits train first")
    rows = hash_of(rows_of(recipe))
    other = folder.differences(
        held, recorded(recipe), rows, ("output_dir", "evaluation.compare", "export", "data.datasets", "data.held_out")
    )
    if other:
        raise Occupied(f"the run in {folder} is of another recipe: {other}; name its output_dir, or train this one in another")
    return made_by(recipe, Plan.load(folder / PLAN), rows)


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """evaluation.json from the scores that the runs left, with intervals and paired differences."""
    folder = RunFolder(recipe.output_dir)
    with folder.locked():
        return _evaluate(recipe, folder)


def _evaluate(recipe: Recipe, folder: RunFolder) -> dict[str, Any]:
    import numpy as np

    from finebits.evaluate.heldout import Scores, table
    from finebits.plan.memory import WIDTHS
    from finebits.report import tables

    main, parts = main_run(recipe), of_run(recipe, folder)
    scores: dict[str, Scores] = {}
    names = [name for name in runs(recipe) if name != main]
    keys = ["full", *(f"{name}_start" for name in (*names, main)), *names, main, "export"]
    for key in dict.fromkeys(keys):
        run = key.removesuffix("_start")
        part, file = (f"{run}/start", START_SCORES) if key.endswith("_start") else (run, SCORES)
        file = folder.run(run) / file
        if part in parts and folder.has(part, parts[part]) and file.exists():
            with np.load(file, allow_pickle=False) as held:
                scores[key] = Scores(**{k: held[k] for k in held.files})
    if not scores:
        raise Invalid(f"{folder} holds no scores yet: run finebits train first")
    against = {k: "full" for k in scores if k != "full"} if "full" in scores else {}
    rival = next((name for name in ("qlora", "zeros") if name in names), None)  # whom the recipe's own run is to beat
    for end in ("", "_start"):
        if f"{rival}{end}" in scores and main + end in scores:
            against[main + end] = f"{rival}{end}"
    against |= {"export": main} if main in scores else {}
    plan = Plan.load(folder / PLAN)
    own, dense = tables.average_bits(tables.matrices(plan)), 8.0 * WIDTHS[plan.levers["dtype"]]
    bits = {k: dense if k in ("full", "lora16") else own for k in scores if own is not None}
    peer = folder.run("qlora") / PEER
    bits |= {k: json.loads(peer.read_text())["bits"] for k in scores if k.startswith("qlora")}
    made = table(scores, {k: label(k)[0] for k in scores}, {k: label(k)[1] for k in scores}, against, bits)
    made |= {"main": main}
    made |= {"verdict": tables.verdict(made)}
    write_text(folder / EVALUATION, json.dumps(made, indent=1) + "\n")
    return made


def export(recipe: Recipe, to: Sequence[str] | None = None, verify: bool | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the targets of the recipe's own run, and compare what the stock libraries load with what was trained. A target's folder that holds
    another's files is replaced only with `overwrite`."""
    folder = RunFolder(recipe.output_dir)
    with folder.locked():
        return _export(recipe, folder, list(to or recipe.export.to), recipe.export.verify if verify is None else verify, overwrite)


def _export(recipe: Recipe, folder: RunFolder, targets: list[str], verify: bool, overwrite: bool) -> dict[str, Any]:
    parts, main = of_run(recipe, folder), main_run(recipe)
    if not folder.has(main, parts[main]):
        raise Invalid(f"{folder} holds no trained model yet: run finebits train first")
    others = []
    if folder.has(EXPORT, parts[EXPORT]):  # targets of the same model that were written before
        others = [t for t in json.loads((folder / EXPORTED).read_text())["targets"] if t["name"] not in targets]
    work(folder, EXPORT, measured=True, to=targets, verify=verify, overwrite=overwrite)
    made = json.loads((folder / EXPORTED).read_text())
    made["targets"] = others + made["targets"]
    write_text(folder / EXPORTED, json.dumps(made, indent=1) + "\n")
    folder.done(EXPORT, parts[EXPORT])
    return made


def report(folder: Path, out: Path | None = None) -> Path:
    """One page of all that the folder holds."""
    from finebits.report.page import run_page

    folder = Path(folder)
    if not (folder / PLAN).exists():
        raise Invalid(f"{folder} holds no {PLAN}, so it is no run of finebits: give the output_dir of a recipe")
    out = out or folder / PAGE
    ours(out, MARKS[PAGE])
    write_text(out, run_page(folder))
    return out


def work(folder: RunFolder, name: str, measured: bool = False, **options: Any) -> None:
    """Run one part in a process of its own and wait for it. A wish to stop (Ctrl-C, SIGTERM, a hang-up) reaches it too: it saves and stops.

    `measured` runs it under the allocator settings that make memory follow the arithmetic, at about twice the page faults.
    """
    Progress("").say(f"{name}: in a process of its own")
    env = os.environ | ((MALLOC | (HUGE if options.get("start") else {})) if measured else {})
    with elsewhere():
        code = process.run("finebits.worker", [str(folder), name, json.dumps(options)], env, folder.handles)
    if code == process.INTERRUPTED or -code in process.STOPS:
        raise KeyboardInterrupt
    if code == -9:
        raise WorkerFailed(f"{name} was killed by the system, most likely for want of memory", 5)
    if code:
        raise WorkerFailed(f"{name} failed", code if code > 0 else 1)
