"""The exports of a job, and what stock libraries make of them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from finebits import runfolder
from finebits.files import write_json
from finebits.run import scores
from finebits.run.part import Part
from finebits.run.stage import main_run


def ship(part: Part, to: Sequence[str], verify: bool, overwrite: bool = False) -> None:
    """Export the recipe's own run and compare what stock libraries load with what was trained."""
    import torch

    from finebits.evaluate.heldout import score
    from finebits.interop import peft, pruning
    from finebits.interop.hf import load_with

    main = main_run(part.recipe)
    part.phase("loading")
    with part.meter.phase("load"):
        model = load_with(part.processor, part.folder.run(main) / runfolder.MODEL)
    memory_file = part.folder.run(main) / runfolder.MEMORY
    cards = {"recipe": part.recipe.to_yaml(), "memory": json.loads(memory_file.read_text()) if memory_file.exists() else None}
    few = part.batches[: max(1, -(-part.recipe.export.rows // part.recipe.evaluation.per_device_eval_batch_size))]
    exported = []
    with part.meter.phase("export"):
        for target in to:
            part.phase(f"writing {target}")
            exported.append(peft.export(model, part.folder.target(target), target, part.processor, **cards, overwrite=overwrite))
            if "note" in exported[-1]:
                part.progress.say(f"{target}: {exported[-1]['note']}")
            if target == "merged":
                pruning.carry(part.model_folder, part.folder.target(target))
    if verify:
        results = []
        for row in exported:
            part.phase(f"verifying {row['name']}")
            with part.meter.phase("verify"):
                results.append(
                    peft.verify(row["path"], row["name"], model, few, None, part.recipe.export.tolerance, part.plan.levers.loss_chunk)
                )
            part.progress.say(
                f"{row['name']}, read by {results[-1]['reader']}: largest logit difference {results[-1]['max_logit_difference']:.2e}: "
                f"{results[-1]['verdict']}"
            )
        exported = results
        if "adapter" in to:
            del model
            part.phase("scoring the export")
            wide = getattr(torch, part.plan.levers.compute or part.plan.levers.dtype)
            theirs = peft.streamed(part.folder.target("adapter"), "adapter", wide)
            hidden = theirs.hidden(part.batches)
            scored = score(theirs.model, part.batches, part.teacher(theirs.model), part.plan.levers.loss_chunk, hidden)
            scores.write(part.run / runfolder.SCORES, scored)
    table = peft.table(exported, part.recipe.export.tolerance, sum(len(b["labels"]) for b in few) if verify else 0)
    write_json(part.folder / runfolder.EXPORTED, table)
    if memory_file.exists():
        memory = json.loads(memory_file.read_text())
        peaks = {k: v for k, v in part.meter.peaks.items() if k != "load"}
        memory["rows"] = [r for r in memory["rows"] if r["phase"] not in peaks]
        memory["rows"] += [{"phase": k, "planned": part.plan.rows.get(k), "measured": v} for k, v in peaks.items()]
        write_json(memory_file, memory)
