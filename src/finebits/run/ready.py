"""What a run would find missing only after hours: the device, the trackers, room on the disk. Looked at before anything else."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from finebits import sizes
from finebits.errors import Invalid
from finebits.recipe import Recipe
from finebits.recipe.mistakes import nearest

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


def _disk(folder: Path) -> None:
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if place.is_dir() and (free := shutil.disk_usage(place).free) < LEAST:
        raise NotReady(
            f"the disk of {folder} has {sizes.show(free)} free, and a run writes {sizes.show(LEAST)} at the least: make room, or name another "
            "output_dir"
        )
