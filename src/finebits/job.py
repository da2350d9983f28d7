"""The main job, verb by verb. Each verb reads the recipe and what earlier verbs wrote to output_dir.

Whatever holds a model runs in a process of its own (finebits.worker), under stated allocator settings, so that its memory can be measured
and nothing of one run is left in the next.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finebits import sizes
from finebits.data.check import Check, require
from finebits.data.check import check as look
from finebits.data.rows import Rows, read
from finebits.files import write_text
from finebits.meter import MALLOC
from finebits.plan.base import Plan
from finebits.progress import Progress
from finebits.recipe import Recipe

NAMES = {
    "full": ("full precision, untuned", "start"),
    "zeros_start": ("QLoRA start (zeros), untuned", "start"),
    "zeros": ("QLoRA start (zeros), tuned", "tuned"),
    "lora16": ("16-bit LoRA, tuned", "tuned"),
    "export": ("exported adapter, stock libraries", "export"),
}


class WorkerFailed(RuntimeError):
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


def rows_of(recipe: Recipe) -> tuple[Rows, Rows]:
    """Training and held-out rows. Without a held-out file, every k-th training row is held out."""
    if not recipe.data.datasets:
        raise ValueError("data.datasets is empty: name at least one file of training rows")
    parts = [read(d.path, d.format) for d in recipe.data.datasets]
    kinds = {p.format for p in parts}
    if len(kinds) > 1:
        raise ValueError(f"data.datasets mixes {' and '.join(sorted(kinds))} rows: one recipe trains on one kind")
    first = parts[0]
    if len(parts) > 1:
        path = ", ".join(p.path for p in parts)
        first = replace(first, path=path, rows=tuple(r for p in parts for r in p.rows))
    if recipe.data.held_out is not None:
        held = read(recipe.data.held_out.path, "auto")
    else:
        every = max(2, round(1 / recipe.data.test_split_size))
        held = replace(first, rows=first.rows[every - 1 :: every])
        first = replace(first, rows=tuple(r for i, r in enumerate(first.rows) if i % every != every - 1))
    if not len(held):
        raise ValueError(f"no row is left to hold out of {len(first)}: raise data.test_split_size or name data.held_out")
    limit = recipe.evaluation.limit
    return first, held[:limit] if limit else held


def left_out(recipe: Recipe) -> tuple[str, ...]:
    """The phases that a recipe does without: nothing is planned for them."""
    full, shipped = recipe.evaluation.full_precision, bool(recipe.export.to)
    wanted = {
        "full": full,
        "samples": full and recipe.evaluation.samples > 0,
        "export": shipped,
        "verify": shipped and recipe.export.verify,
    }
    return tuple(phase for phase, kept in wanted.items() if not kept)


def settings(recipe: Recipe) -> Any:
    """The planner's settings out of a recipe."""
    from finebits.interop.planning import Settings

    return Settings(
        formats=tuple(recipe.formats()),
        adapter=recipe.adapter_value(),
        init=recipe.init_value(),
        quantizer=recipe.quantizer_value(),
        calibration=recipe.quantization.calibration,
        refine=tuple(recipe.refine_values()),
        objective=recipe.quantization.objective,
        calibration_rows=recipe.quantization.calibration_rows,
        planner=recipe.planner_value(),
        ranks=tuple(recipe.adapter.ranks),
        inits=tuple(recipe.init_values()),
        serve_budget=None if recipe.budget.serve_memory is None else sizes.parse(recipe.budget.serve_memory),
        locks=recipe.lock_values(),
        target_modules=recipe.adapter.target_modules,
        overrides=recipe.override_values(),
        reserve=recipe.budget.reserve_share,
        compared=tuple(recipe.evaluation.compare),
        left_out=left_out(recipe),
        seed=recipe.training.seed,
        dtype=recipe.model.dtype,
        device=recipe.budget.device,
        attn_implementation="sdpa" if recipe.model.attn_implementation == "auto" else recipe.model.attn_implementation,
        max_length=recipe.data.max_length,
        per_device_train_batch_size=recipe.training.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.training.gradient_accumulation_steps,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        loss_chunk=recipe.training.loss_chunk,
        optim=recipe.training.optim,
        levers=recipe.budget.levers,
        max_steps=recipe.training.max_steps,
        num_train_epochs=recipe.training.num_train_epochs,
        dropout=recipe.adapter.dropout,
        assistant_only_loss=recipe.data.assistant_only_loss,
        model_revision=recipe.model.model_revision,
    )


def plan(recipe: Recipe, out: Path | None = None, pareto: int = 0, fast: bool = False, probed: bool = False) -> Plan:
    """Choose the bits; write the plan. `pareto` also solves that many budgets from the smallest that fits upwards; `probed` trains the worst
    batches once and plans again with what was measured."""
    from finebits.interop.planning import plan_model

    data = None
    if not fast and recipe.data.datasets:
        data = rows_of(recipe)[0]
    made = plan_model(
        recipe.model.model_name_or_path, recipe.budget.memory, data, settings(recipe), Progress("pricing"), fast=fast, pareto=pareto
    )
    if probed:
        made = probe(recipe, made, pareto)
    made.save(out or Path(recipe.output_dir) / "plan.json")
    return made


def probe(recipe: Recipe, made: Plan, pareto: int = 0) -> Plan:
    """The plan again, calibrated: its worst batches are trained once in a process of their own under the measured settings, and what the
    process holds beside tensors is no guess any more. Load, eval and save peaks become the measured ones. Writes probe.json."""
    from finebits.plan.whole import again

    if recipe.budget.device != "cpu":
        raise ValueError("--probe measures the memory of a process, and budget.device is cuda: plan without it")
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    made.save(folder / "plan.json")
    work(folder, "probe", measured=True)
    shutil.rmtree(folder / "runs" / "probe", ignore_errors=True)  # it is no run of the job
    found = json.loads((folder / "probe.json").read_text())
    new = again(made, pareto=pareto, runtime=found["runtime"])
    stored = ("linear weights", "head", "adapters", "frozen factors")
    moved = sum(new.memory[k] - made.memory[k] for k in stored)
    rows = new.rows | {k: v + moved for k, v in found["peaks"].items() if k != "train"}
    return replace(new, rows=rows, solver=new.solver | {"probed": {"planned": found["planned"], "measured": found["peaks"]["train"]}})


def what_fits(recipe: Recipe, models: Sequence[str], fast: bool = False) -> list[Any]:
    """What each model could be within the recipe's budget and settings, the best buy first: rows of finebits.plan.compare."""
    from finebits.interop.planning import compare

    assert recipe.budget.memory is not None
    data = rows_of(recipe)[0] if recipe.data.datasets and not fast else None
    return compare(recipe.budget.memory, models, settings(recipe), Progress("pricing"), fast, data)


def check(recipe: Recipe) -> Check:
    """The data gate over training and held-out rows. Writes data.json; raises GateFailed (exit code 4)."""
    from finebits.interop.hf import folder_of, tokenizer_of

    tokenizer = tokenizer_of(folder_of(recipe.model.model_name_or_path, recipe.model.model_revision))
    found: Check | None = None
    for rows in rows_of(recipe):
        one = look(rows, tokenizer, recipe.data.max_length, recipe.data.assistant_only_loss)
        if found is None:
            found = one
            write_text(Path(recipe.output_dir) / "data.json", json.dumps(one.to_json()) + "\n")
        require(one)
    assert found is not None
    return found


def train(recipe: Recipe, plan_path: Path | None = None, resume: bool = False, dry_run: bool = False, max_steps: int | None = None) -> None:
    """The whole way: gate, plan, every run, evaluation, export, verification, page. `max_steps` cuts the runs short."""
    folder, say = Path(recipe.output_dir), Progress("").say
    folder.mkdir(parents=True, exist_ok=True)
    if max_steps is not None:
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": max_steps})})
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    check(recipe)
    if plan_path is not None:
        made = Plan.load(plan_path)
        made.save(folder / "plan.json")
    elif resume and (folder / "plan.json").exists():
        made = Plan.load(folder / "plan.json")
    else:
        made = plan(recipe)
    say(made.summary().replace("\n", "\n "))
    if dry_run:
        return
    if recipe.evaluation.full_precision and not (resume and (folder / "runs" / "full" / "scores.npz").exists()):
        work(folder, "full")
    for name in runs(recipe):
        if not (resume and (folder / "runs" / name / "scores.npz").exists()):
            own = name == main_run(recipe)
            if name != "lora16" and not (resume and (folder / "runs" / name / "start.npz").exists()):
                work(folder, name, measured=own, start=True)
            work(folder, name, measured=own, resume=resume)
    if recipe.export.to:
        export(recipe)
    evaluate(recipe)
    say(f"wrote {report(folder)}")


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """evaluation.json from the scores that the runs left, with intervals and paired differences."""
    import numpy as np

    from finebits.evaluate.heldout import Scores, table
    from finebits.plan.memory import WIDTHS
    from finebits.report import tables

    folder, main = Path(recipe.output_dir), main_run(recipe)
    scores: dict[str, Scores] = {}
    keys = ["full", "zeros_start", f"{main}_start", "zeros", main, "lora16", "export"]
    for key in dict.fromkeys(keys):
        run = key.removesuffix("_start")
        file = folder / "runs" / run / ("start.npz" if key.endswith("_start") else "scores.npz")
        if file.exists():
            with np.load(file, allow_pickle=False) as held:
                scores[key] = Scores(**{k: held[k] for k in held.files})
    if not scores:
        raise ValueError(f"{folder} holds no scores yet: run finebits train first")
    against = {k: "full" for k in scores if k != "full"} if "full" in scores else {}
    against |= {f"{main}_start": "zeros_start"} if "zeros_start" in scores and main != "zeros" else {}
    against |= {main: "zeros"} if "zeros" in scores and main != "zeros" else {}
    against |= {"export": main} if main in scores else {}
    plan = Plan.load(folder / "plan.json")
    own, dense = tables.average_bits(tables.matrices(plan)), 8.0 * WIDTHS[plan.levers["dtype"]]
    bits = {k: dense if k in ("full", "lora16") else own for k in scores if own is not None}
    made = table(scores, {k: label(k)[0] for k in scores}, {k: label(k)[1] for k in scores}, against, bits)
    made |= {"main": main}
    made |= {"verdict": tables.verdict(made)}
    write_text(folder / "evaluation.json", json.dumps(made, indent=1) + "\n")
    return made


def export(recipe: Recipe, to: Sequence[str] | None = None, verify: bool | None = None) -> dict[str, Any]:
    """Write the targets of the recipe's own run, and compare what the stock libraries load with what was trained."""
    folder = Path(recipe.output_dir)
    targets = list(to or recipe.export.to)
    checked = recipe.export.verify if verify is None else verify
    if not (folder / "runs" / main_run(recipe) / "model").exists():
        raise ValueError(f"{folder} holds no trained model yet: run finebits train first")
    work(folder, "export", to=targets, verify=checked)
    return json.loads((folder / "export.json").read_text())


def report(folder: Path, out: Path | None = None) -> Path:
    """One page of all that the folder holds."""
    from finebits.report.page import run_page

    folder = Path(folder)
    if not (folder / "plan.json").exists():
        raise ValueError(f"{folder} holds no plan.json, so it is no run of finebits: give the output_dir of a recipe")
    out = out or folder / "report.html"
    write_text(out, run_page(folder))
    return out


def work(folder: Path, name: str, measured: bool = False, **options: Any) -> None:
    """Run one part in a process of its own and wait for it. Ctrl-C reaches it too: it saves and stops.

    `measured` runs it under the allocator settings that make memory follow the arithmetic, at about twice the page faults.
    """
    command = [sys.executable, "-m", "finebits.worker", str(folder), name, json.dumps(options)]
    child = subprocess.Popen(command, env=os.environ | (MALLOC if measured else {}))
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            continue
    if code == 130 or code == -2:
        raise KeyboardInterrupt
    if code == -9:
        raise WorkerFailed(f"{name} was killed by the system, most likely for want of memory", 5)
    if code:
        raise WorkerFailed(f"{name} failed", code if code > 0 else 1)
