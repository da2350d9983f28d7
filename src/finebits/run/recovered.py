"""How an adapter that was trained on a pruned model does on the whole one: the run's held-out rows, scored as the run's own models were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finebits import registry
from finebits.recipe import Recipe
from finebits.run.material import Material
from finebits.runfolder import FULL, PLAN, RECIPE, SCORES, RunFolder


def losses(folder: RunFolder, run: Path, out: Path, formats: Sequence[str]) -> list[dict[str, Any]]:
    """[{"model", "adapter", "loss"}]: the pruned model before and after training, then the whole one without and with what was recovered to
    `out`, as its files have it (a block in memory at a time, read by stock libraries) and in each of these formats."""
    import torch

    from finebits.build import Adapted
    from finebits.evaluate.heldout import score
    from finebits.export.base import Read
    from finebits.interop import from_peft, peft_folder
    from finebits.interop.hf import folder_of
    from finebits.interop.selecting import targets
    from finebits.interop.stock import Stock
    from finebits.plan.base import Plan, Spec
    from finebits.plan.levers import Levers
    from finebits.progress import Progress
    from finebits.run import scores
    from finebits.run.source import Subject

    recipe, plan = Recipe.load(folder / RECIPE), Plan.load(folder / PLAN)
    name = str(peft_folder.opened(out)[0]["base_model_name_or_path"])
    subject, chunk = Subject(folder_of(name)), plan.levers.loss_chunk
    size = recipe.evaluation.per_device_eval_batch_size
    batches = Material.load(folder).batches(subject.task, subject.processor, size, plan.levers.rounding)
    dtype = getattr(torch, plan.levers.compute or plan.levers.dtype)
    found, progress = list[dict[str, Any]](), Progress("recover")

    def note(model: str, adapter: bool, loss: float) -> None:
        found.append({"model": model, "adapter": adapter, "loss": loss})
        progress.say(f"{model}, {'with' if adapter else 'without'} the adapter: loss {loss:.4f}")

    for file, adapter in ((folder.run(FULL) / SCORES, False), (run / SCORES, True)):
        if (scored := scores.read(file)) is not None:
            note("pruned" if not adapter else "pruned, as it was trained", adapter, scored.loss)
    for adapter in (False, True):
        theirs = Stock(Read("transformers, peft", subject.folder), out / (peft_folder.TENSORS if adapter else "none"), dtype)
        note("whole", adapter, score(theirs.model, batches, None, chunk, theirs.hidden(batches)).loss)
        del theirs
    for text in formats:
        format = registry.from_json("formats", registry.spelled(text))
        shapes = targets(from_peft.skeleton(subject.folder, torch.float32), "all-linear")
        over = Plan({n: Spec(format) for n, s in shapes.items() if len(s) == 2}, model=name, levers=Levers(dtype=plan.levers.dtype))
        model = from_peft.load_peft(out, over)
        with_it = score(model, batches, None, chunk).loss
        for host in model.modules():
            if isinstance(host, Adapted):
                host.active = []
        note(f"whole, in {text}", False, score(model, batches, None, chunk).loss)
        note(f"whole, in {text}", True, with_it)
        del model
    return found


def told(manifest: Any, out: Path, losses: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the command shows."""
    hashes = {key: getattr(manifest, key) for key in ("base", "pruned", "aligned")}
    return {"path": str(out), "model": manifest.model, **hashes, "parameters": list(manifest.parameters), "losses": list(losses)}
