"""The exports of a job, and what stock libraries make of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finebits import runfolder
from finebits.files import write_json
from finebits.run import scores
from finebits.run.part import Part
from finebits.run.stage import Stage, main_run
from finebits.sizes import show


def ship(part: Part, stage: Stage) -> None:
    """Export the recipe's own run as a stage says, and compare what stock libraries load with what was trained, and what runtimes answer in
    their environments; then, where it is to be rounded once more, do that for the targets that hold codes, and compare with that. What is not
    the model that was trained is a row of export.json like all others: the rest is verified too."""
    import torch

    from finebits.evaluate.heldout import score, teacher
    from finebits.export import base as exports
    from finebits.export._mixes import BLOCKS, MIXES
    from finebits.interop import peft, pruning
    from finebits.interop.hf import load_with
    from finebits.interop.runtimes import base as runtimes
    from finebits.requantize import Requantize

    main = main_run(part.recipe)
    part.phase("loading")
    with part.meter.phase("load"):
        model = load_with(part.processor, part.folder.run(main) / runfolder.MODEL)
    memory_file = part.folder.run(main) / runfolder.MEMORY
    cards = {
        "recipe": part.recipe.to_yaml(),
        "memory": json.loads(memory_file.read_text(encoding="utf-8")) if memory_file.exists() else None,
    }
    few = part.batches[: max(1, -(-stage.rows // part.recipe.evaluation.per_device_eval_batch_size))]
    how = None if stage.requantize is None else Requantize.read(stage.requantize)
    anew = exports.rounded_anew(stage.to, how)

    if stage.importance and any(":" in target and BLOCKS[MIXES[target.partition(":")[2]].kind] > 1 for target in stage.to):
        part.phase("measuring inputs")
        with part.meter.phase("export"):
            cards["importance"] = _importance(part, model)

    def made(targets: Sequence[str], **more: Any) -> list[dict[str, Any]]:
        """The rows of these targets."""
        exported, results = [], []
        with part.meter.phase("export"):
            for target in targets:
                part.phase(f"writing {target}")
                place = part.folder.target(target)
                base = stage.bases.get(target)
                exported.append(
                    peft.export(model, place, target, part.processor, base_name=base, **cards, **more, overwrite=stage.overwrite)
                )
                if "note" in exported[-1]:
                    part.progress.say(f"{target}: {exported[-1]['note']}")
                if target == "merged":
                    pruning.carry(part.model_folder, place)
        chunk, taught = part.plan.levers.loss_chunk, None
        for row in exported if stage.verify else ():
            part.phase(f"verifying {row['name']}")
            with part.meter.phase("verify"):
                taught = taught or (teacher(model, few, dtype=getattr(torch, part.plan.levers.dtype)), peft.exactly(model, few))
                trained, exact = taught
                try:
                    found = peft.verify(row["path"], row["name"], model, few, trained, stage.tolerance, chunk, exact)
                    said = f"largest logit difference {found['max_logit_difference']:.2e}: {found['verdict']}"
                    part.progress.say(f"{row['name']}, read by {found['reader']}: {said}")
                except exports.VerificationFailed as e:
                    found = e.result
                    part.progress.say(str(e))
            results.append(row | found)
            with part.meter.phase("verify"):
                served = runtimes.verify(
                    Path(row["path"]), row["name"], stage.runtimes, trained, few, part.processor, chunk, exact, stage.tolerance
                )
            for one in served:
                told = one["note"] if "note" in one else f"KL {one['kl']:.4f}, top-1 {one['top1']:.1%}, loss {one['loss']:.4f}"
                part.progress.say(f"{row['name']} in {one['reader']}: {one['verdict']}: {told}")
            results[-1] |= {"runtimes": served} if served else {}
        return results or exported

    exported = made([target for target in stage.to if target not in anew])
    if how is not None:
        part.phase("rounding once more")
        with part.meter.phase("requantize"):
            report = _rounded(part, model, how, few)
        exported += [row | {"requantized": report} for row in made(anew, requantized=report)]
    if stage.verify and "adapter" in stage.to:
        del model
        part.phase("scoring the export")
        wide = getattr(torch, part.plan.levers.compute or part.plan.levers.dtype)
        theirs = peft.streamed(part.folder.target("adapter"), "adapter", wide)
        hidden = theirs.hidden(part.batches)
        scored = score(theirs.model, part.batches, part.teacher(theirs.model), part.plan.levers.loss_chunk, hidden)
        scores.write(part.run / runfolder.SCORES, scored)
        answered(part, theirs)
    table = peft.table(exported, stage.tolerance, sum(len(b["labels"]) for b in few) if stage.verify else 0)
    write_json(part.folder / runfolder.EXPORTED, table)
    if memory_file.exists():
        memory = json.loads(memory_file.read_text(encoding="utf-8"))
        peaks = {k: v for k, v in part.meter.peaks.items() if k != "load"}
        memory["rows"] = [r for r in memory["rows"] if r["phase"] not in peaks]
        memory["rows"] += [{"phase": k, "planned": part.plan.rows.get(k), "measured": v} for k, v in peaks.items()]
        write_json(memory_file, memory)


def answered(part: Part, theirs: Any) -> None:
    """What the exported adapter over its base answers to the run's prompts, beside the answers before and after, where there is room for all
    of it at once."""
    file = part.folder / runfolder.SAMPLES
    if not file.exists() or not part.recipe.evaluation.samples:
        return
    room, linears = part.room("verify"), sum(math.prod(c["shape"]) for c in part.plan.costs.values()) * part.plan.levers.inner
    if room is not None and linears > room:
        part.progress.say(
            f"no samples of the export: its linears take {show(linears)} where stock libraries read it, and {show(room)} are left"
        )
        return
    if theirs.prompted and not theirs.model.can_generate():
        part.progress.say("no samples of the export: its prompts are not read where a head answers")
        return
    from finebits.stream import in_memory

    part.phase("samples of the export")
    with in_memory(theirs.model, theirs.blocks, theirs.read):
        answers = part.samples(theirs.around if theirs.prompted else theirs.model)
    held = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, [s | {"exported": a} for s, a in zip(held, answers, strict=True)] if len(held) == len(answers) else held)


def _calibration(part: Part) -> list[Any]:
    """Training rows in batches, the longest first."""
    rows = list(part.material.train)[: part.recipe.quantization.calibration_rows]
    rows = [vars(e) for e in sorted(rows, key=lambda e: -len(e.input_ids))]
    size = part.plan.levers.per_device_train_batch_size
    return [part.task.batch(rows[i : i + size], part.processor, part.plan.levers.rounding) for i in range(0, len(rows), size)]


def _importance(part: Part, model: Any) -> dict[str, Any]:
    """Mean squares of the inputs of every linear layer on calibration rows, by module."""
    from finebits.build import hosts
    from finebits.calibrate.whole_model import collect
    from finebits.stats.mean_square import MeanSquare

    needs = {name: frozenset({MeanSquare}) for name, _ in hosts(model)}
    found = collect(model, _calibration(part), part.task.states, needs, part.task.inside)
    return {name: measured[MeanSquare].value() for name, measured in found.items()}


def _rounded(part: Part, model: Any, how: Any, few: Sequence[Any]) -> dict[str, Any]:
    """Round the model in place; what is told of it (requantized.json), with losses on a few held-out batches."""
    import torch

    from finebits.evaluate.heldout import own, score, teacher
    from finebits.report.cells import short
    from finebits.requantize import requantize

    chunk, levers = part.plan.levers.loss_chunk, part.plan.levers
    batches = _calibration(part)
    tuned = teacher(model, few, dtype=getattr(torch, levers.dtype))
    task = part.task
    layers = requantize(
        model, how, batches, task.states, head=task.head(model), keep=task.inside, keep_final=task.outside, progress=part.progress
    )
    after = score(model, few, tuned, chunk)
    assert after.kl is not None
    return {
        "schema": "finebits.requantized/1",
        "name": short(how.format),
        **how.to_json(),
        "rows": sum(len(b["labels"]) for b in batches),
        "loss": after.loss,
        "tuned": own(tuned, few, chunk).loss,
        "kl": float(after.kl.sum() / after.tokens.sum()),
        "layers": {name: kept._asdict() for name, kept in layers.items()},
    }
