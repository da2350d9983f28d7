"""The unquantized, untuned model, and the start of a run."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, cast

from finebits import runfolder
from finebits.files import write_json
from finebits.run import scores
from finebits.run.part import Part, plan_for
from finebits.sizes import show


def full(part: Part) -> None:
    """The unquantized, untuned model: its states are what every other model is compared with."""
    from finebits.evaluate.heldout import own, teacher
    from finebits.interop.streaming import Streamed
    from finebits.stream import in_memory
    from finebits.train import sound

    part.phase("scoring")
    with part.meter.phase("full"):
        streamed = Streamed.of(part.plan, part.model_folder)
        hidden = streamed.hidden(part.batches, part.progress)
        reference = teacher(streamed.model, part.batches, hidden, file=part.run / runfolder.STATES)
        scored = own(reference, part.batches, chunk=part.plan.levers.loss_chunk)
    sound(
        "the loss", "the unquantized, untuned model on the held-out rows", [scored.loss], "look at its files, or set model.dtype to float32"
    )
    scores.write(part.run / runfolder.SCORES, scored)
    write_json(part.run / runfolder.PEAKS, part.meter.peaks)
    part.progress.say(f"full precision: loss {scored.loss:.4f} on {len(scored.tokens)} held-out rows")
    room = part.room("full")
    linears = sum(math.prod(cost["shape"]) for cost in part.plan.costs.values()) * part.plan.levers.inner
    if part.recipe.evaluation.samples and (room is None or linears <= room):
        part.phase("samples")
        with in_memory(streamed.model, streamed.blocks, streamed.read):
            write_json(part.run / runfolder.SAMPLES, part.samples(streamed.model))
    elif part.recipe.evaluation.samples:
        part.progress.say(f"no samples of the unquantized model: its linears take {show(linears)}, and the budget leaves {show(room or 0)}")


def begin(part: Part) -> None:
    """Quantize, start the adapters, save that, and score it untuned. In a process of its own, so that training begins in a clean one."""
    import finebits as fb
    from finebits.build import Built, built, needs
    from finebits.evaluate.heldout import score
    from finebits.interop.hf import sweeps
    from finebits.meter import relax

    (part.run / runfolder.EVENTS).unlink(missing_ok=True)
    part.phase("quantizing and starting")
    plan = plan_for(part)
    with part.meter.phase("start" if sweeps(plan) or needs(plan) else "load"):
        model, _ = fb.load_planned(plan, data=part.material.train, progress=part.progress)
    fb.save(model, part.run / runfolder.STARTED, packed=False)
    if choices := fb.choices(model):
        write_json(part.run / runfolder.CHOICES, choices)
        part.progress.say(f"{part.name}: {chosen(choices)}")
    if refined := cast(Built, built(model)).refined:
        write_json(part.run / runfolder.REFINED, refined)
        first, last = (sum(v[i] for v in refined.values()) / len(refined) for i in (0, 1))
        part.progress.say(
            f"{part.name}: refinements took the loss from {first:.4f} (first epoch) to {last:.4f} (last), mean of {len(refined)}"
        )
    with part.meter.phase("eval"):
        score(model, part.batches[:1], chunk=part.plan.levers.loss_chunk)  # the longest rows
    relax()
    part.scores(model, runfolder.START_SCORES, "scoring the start")
    write_json(part.run / runfolder.PEAKS, part.meter.peaks)


def chosen(choices: dict[str, Any]) -> str:
    """In one line: how many matrices each candidate won, and how much output error is left on average."""
    won = Counter(c["tried"][c["won"]]["init"]["paper"] for c in choices.values())
    share = sum(c["share"] for c in choices.values()) / len(choices)
    return f"{', '.join(f'{k} won {n}' for k, n in won.most_common())} of {len(choices)} matrices; output error {share:.3f} of zeros' on average"
