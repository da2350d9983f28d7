"""QLoRA of the stock libraries: the run that most people would make."""

from __future__ import annotations

from typing import Any

from finebits import runfolder
from finebits.files import write_json
from finebits.run.part import Part
from finebits.run.tune import arguments_of


def peer(part: Part, start: bool = False) -> None:
    """QLoRA of the stock libraries on the batches of the recipe's own run: trained and scored, or (`start`) scored untuned. What a weight takes
    there is left in peer.json."""
    import torch

    from finebits.interop import peers
    from finebits.train import met

    recipe, plan = part.recipe, part.plan
    levers = plan.levers
    adapter: Any = recipe.adapter_value()  # with an alpha
    names = [name for name, spec in plan.modules.items() if spec.adapter is not None]
    part.phase("loading")
    model = peers.qlora(part.model_folder, names, getattr(torch, levers.compute or levers.dtype), levers.device)
    write_json(part.run / runfolder.PEER, {"bits": peers.bits(model), "versions": peers.versions()})
    if start:
        part.scores(model, runfolder.START_SCORES, "scoring the start")
        return
    assert part.examples is not None
    arguments, _ = arguments_of(recipe, plan)
    size, passes = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    t = recipe.training
    batches = met(part.units.lengths, size, t.seed, passes, t.max_steps, t.num_train_epochs)
    part.phase("training")
    torch.manual_seed(recipe.training.seed)
    model = peers.adapted(model, names, adapter.rank, adapter.alpha, recipe.adapter.dropout)
    packed = (lambda rows: part.task.batch(rows, part.processor, levers.rounding)) if recipe.data.packing else None
    folder = part.run / runfolder.CHECKPOINTS
    peers.train(model, part.processor, part.examples, batches, folder, arguments, part.progress.event, packed)
    model.save_pretrained(part.run / runfolder.MODEL)
    part.scores(model.get_base_model(), runfolder.SCORES, "scoring the tuned model")
