"""What a run would find missing only after hours: the device, the trackers, room on the disk. Looked at before anything else."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from finebits import sizes
from finebits.errors import Invalid
from finebits.plan.base import Plan
from finebits.recipe import Recipe
from finebits.recipe.mistakes import nearest
from finebits.run.stage import runs

TRACKERS = {  # names of transformers, and the package that each needs
    "azure_ml": "azureml.core",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
LEAST = 64 << 20  # bytes that any run writes: adapters, checkpoints, a page
STORED = ("linear weights", "embeddings", "head", "norms and other", "adapters", "frozen factors")  # terms that a saved model holds


class NotReady(Invalid):
    """A run could not be finished here."""

    code = 2


def ready(recipe: Recipe) -> None:
    """Raise NotReady where a run of this recipe could not end well on this machine.

    >>> ready(Recipe.parse("{model: {model_name_or_path: m}, training: {report_to: wandbb}}"))
    Traceback (most recent call last):
        ...
    finebits.run.ready.NotReady: training.report_to names no tracker of transformers: 'wandbb': did you mean wandb?
    """
    _device(recipe.budget.device)
    _trackers(recipe.training.report_to)
    _disk(Path(recipe.output_dir))


def _device(device: str) -> None:
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise NotReady(
            "budget.device is cuda, and torch sees no CUDA device here: run where there is one, or say --device cpu or --device auto"
        )


def _trackers(named: str | list[str]) -> None:
    for name in [named] if isinstance(named, str) else named:
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            meant = nearest(name, TRACKERS)
            hint = f"did you mean {meant}?" if meant else f"it knows {', '.join(TRACKERS)}"
            raise NotReady(f"training.report_to names no tracker of transformers: {name!r}: {hint}")
        top = TRACKERS[name].partition(".")[0]
        absent = importlib.util.find_spec(top) is None and (name != "tensorboard" or importlib.util.find_spec("tensorboardX") is None)
        if absent:
            raise NotReady(
                f"training.report_to is {name}, and the package {top} is not installed: pip install {top.replace('_', '-')}, or say none"
            )


def roomy(recipe: Recipe, plan: Plan) -> None:
    """Raise NotReady where the disk has less room than a run of this plan writes at the least."""
    writes = {what: size for what, size in written(recipe, plan).items() if size}
    of = ", ".join(f"{what} {sizes.show(size)}" for what, size in writes.items())
    _disk(Path(recipe.output_dir), sum(writes.values()), f" ({of})")


def written(recipe: Recipe, plan: Plan) -> dict[str, int]:
    """Bytes that a run writes at the least: models of its own and the compared runs, checkpoints of one run with one more while it is written,
    and what is exported.

    >>> recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=["export.to=[adapter, merged]", "evaluation.compare=[]"])
    >>> written(recipe, fb.Plan({}, memory={"linear weights": 100, "adapters": 10, "optimizer": 20}, sizes={"dense": 800}))
    {'models': 110, 'checkpoints': 60, 'exports': 420}
    """
    t, sums = recipe.training, plan.memory
    adapters = sums.get("adapters", 0)
    model, each = sum(sums.get(term, 0) for term in STORED), adapters + sums.get("optimizer", 0)
    dense = model - sums.get("linear weights", 0) + plan.sizes.get("dense", 0) * 2 // plan.levers.width
    exports = {"adapter": adapters, "merged": dense}
    return {
        "models": model * len(runs(recipe)),
        "checkpoints": 0
        if t.save_strategy == "no"
        else each * (t.save_total_limit + 1 + (t.save_strategy == "best" or t.load_best_model_at_end)),
        "exports": sum(exports.get(to, model) for to in recipe.export.to),
    }


def _disk(folder: Path, least: int = LEAST, of: str = "") -> None:
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if place.is_dir() and (free := shutil.disk_usage(place).free) < least:
        raise NotReady(
            f"the disk of {folder} has {sizes.show(free)} free, and a run writes {sizes.show(least)} at the least{of}: make room, or name "
            "another output_dir"
        )
