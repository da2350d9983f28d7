"""What the runs of a folder have come to, as one table."""

from __future__ import annotations

import json
from typing import Any

from finebits.errors import Invalid
from finebits.files import Occupied, write_json
from finebits.plan.base import Plan
from finebits.recipe import Recipe
from finebits.run.material import Material
from finebits.run.stage import LORA16, QLORA, made_by, main_run, recorded, runs
from finebits.runfolder import EVALUATION, EXPORT, FULL, PEER, PLAN, SCORES, START_SCORES, RunFolder
from finebits.tasks.base import Task

NAMES = {
    FULL: ("full precision, untuned", "start"),
    "zeros_start": ("QLoRA start (zeros), untuned", "start"),
    "zeros": ("QLoRA start (zeros), tuned", "tuned"),
    LORA16: ("16-bit LoRA, tuned", "tuned"),
    f"{QLORA}_start": ("QLoRA (PEFT, bitsandbytes), untuned", "start"),
    QLORA: ("QLoRA (PEFT, bitsandbytes), tuned", "tuned"),
    EXPORT: ("exported adapter, stock libraries", "export"),
}


def label(key: str) -> tuple[str, str]:
    """Name and stage of an evaluation entry."""
    if key in NAMES:
        return NAMES[key]
    name = key.removesuffix("_start")
    return (f"{name} start, untuned", "start") if key.endswith("_start") else (f"{name} start, tuned", "tuned")


def parts_of(recipe: Recipe, folder: RunFolder, rows: str) -> dict[str, str]:
    """What `made_by` gives for the run in a folder, which must be this recipe's over rows of that hash. Raises Invalid where there is none, or
    another's."""
    record = folder.record()
    if not record:
        raise Invalid(f"{folder} holds no run yet: run finebits train first")
    other = folder.differences(
        record, recorded(recipe), rows, ("output_dir", "evaluation.compare", "export", "data.datasets", "data.held_out")
    )
    if other:
        raise Occupied(f"the run in {folder} is of another recipe: {other}; name its output_dir, or train this one in another")
    plan = Plan.load(folder / PLAN)
    return made_by(recipe.settled(plan), plan, rows)


def evaluation(recipe: Recipe, folder: RunFolder, parts: dict[str, str], task: Task) -> dict[str, Any]:
    """evaluation.json from the scores that the runs left, with intervals and paired differences: of those `parts` that are what they should be
    made of."""
    from finebits.evaluate.heldout import Scores, table
    from finebits.report import results, tables
    from finebits.run.scores import read

    main = main_run(recipe)
    scores: dict[str, Scores] = {}
    names = [name for name in runs(recipe) if name != main]
    keys = [FULL, *(f"{name}_start" for name in (*names, main)), *names, main, EXPORT]
    for key in dict.fromkeys(keys):
        run = key.removesuffix("_start")
        part, file = (f"{run}/start", START_SCORES) if key.endswith("_start") else (run, SCORES)
        file = folder.run(run) / file
        if part in parts and folder.has(part, parts[part]) and (stored := read(file)) is not None:
            scores[key] = stored
    if not scores:
        raise Invalid(f"{folder} holds no scores yet: run finebits train first")
    against = {k: FULL for k in scores if k != FULL} if FULL in scores else {}
    rival = next((name for name in (QLORA, "zeros") if name in names), None)  # whom the recipe's own run is to beat
    for end in ("", "_start"):
        if f"{rival}{end}" in scores and main + end in scores:
            against[main + end] = f"{rival}{end}"
    against |= {EXPORT: main} if main in scores else {}
    plan = Plan.load(folder / PLAN)
    own, dense = tables.average_bits(tables.matrices(plan)), 8.0 * plan.levers.width
    bits = {k: dense if k in (FULL, LORA16) else own for k in scores if own is not None}
    peer = folder.run(QLORA) / PEER
    bits |= {k: json.loads(peer.read_text(encoding="utf-8"))["bits"] for k in scores if k.startswith(QLORA)}
    named, staged = ({k: label(k)[i] for k in scores} for i in (0, 1))
    objective = recipe.objective_value()
    if objective is None:
        result = table(scores, named, staged, against, bits, task)
    else:
        from finebits.evaluate.preferences import of_answers

        start = lambda key: f"{main if key in (EXPORT, FULL) else key.removesuffix('_start')}_start"  # noqa: E731
        made = lambda kept: table(kept, named, staged, against, bits, task)  # noqa: E731
        result = of_answers(scores, Material.load(folder).held, made, objective, start)
    result |= {"main": main}
    result |= {"verdict": results.verdict(result)}
    write_json(folder / EVALUATION, result)
    return result
