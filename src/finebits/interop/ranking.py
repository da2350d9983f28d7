"""Ranks that are given out before any bits are chosen, by what the weights are and what the rows show of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finebits.build import Progress, hosts
from finebits.interop.checkpoint import Tensors
from finebits.interop.hf import load_planned
from finebits.interop.pricing import Calibration
from finebits.interop.selecting import Mistake, Shape
from finebits.plan.base import Plan, Spec
from finebits.plan.levers import Workload
from finebits.quantizers.base import check_finite
from finebits.ranks.base import Ranking, adapters
from finebits.tasks import base as tasks

if TYPE_CHECKING:
    from finebits.recipe.settings import Settings


def check_ranked(adapter: Any) -> None:
    """Raise Mistake where an adapter has no rank that a matrix could have alone.

    >>> check_ranked(fb.RandLoRA())
    Traceback (most recent call last):
        ...
    finebits.interop.selecting.Mistake: ranks are to be chosen, and RandLoRA has none: leave ranks out or use another adapter
    """
    who, instead = type(adapter).__name__, "leave ranks out or use another adapter"
    if not adapter.rank:
        raise Mistake(f"ranks are to be chosen, and {who} has none: {instead}")
    if adapter.shared:
        together = " and ".join(sorted(adapter.shared))
        raise Mistake(f"ranks are to be chosen, and matrices of one shape hold {together} of {who} together: {instead}")


def given_out(
    ranking: Ranking, settings: Settings, folder: Path, shapes: Mapping[str, Shape], data: Any, workload: Workload, progress: Progress
) -> dict[str, Any]:
    """The adapter of every matrix as the ranking has it, None for one that gets no rank. Raises Mistake where the ranking asks for what
    rows show and there are none."""
    check_ranked(settings.adapter)
    if (ranking.needs or ranking.searches) and data is None:
        raise Mistake(f"{type(ranking).__name__} gives out ranks by what calibration rows show, and there are none: name data.datasets")
    calibration = Calibration(folder, data, workload) if ranking.needs or ranking.searches else None
    if ranking.searches and calibration is not None:
        scores = _searched(ranking, settings, folder, shapes, calibration, workload, progress)
    else:
        scores = _scored(ranking, settings, folder, shapes, calibration, progress)
    return adapters(ranking, {name: scores[name] for name in shapes}, settings.adapter, shapes)


def _scored(
    ranking: Ranking, settings: Settings, folder: Path, shapes: Mapping[str, Shape], calibration: Calibration | None, progress: Progress
) -> dict[str, Any]:
    """What the ranking says of every matrix; the statistics of one block are there at a time."""
    tensors, scores = Tensors(folder), dict[str, Any]()
    needs = dict.fromkeys(shapes, ranking.needs)
    for seen in [dict.fromkeys(shapes, {})] if calibration is None else calibration.statistics(needs):
        for name, stats in seen.items():
            W = tensors[f"{name}.weight"]
            check_finite(W, f"{name}.weight")
            scores[name] = ranking.score(W.float(), settings.adapter, stats)
            progress(len(scores), len(shapes), f"ranks: {name}")
    return scores


def _searched(
    ranking: Ranking,
    settings: Settings,
    folder: Path,
    shapes: Mapping[str, Shape],
    calibration: Calibration,
    workload: Workload,
    progress: Progress,
) -> dict[str, Any]:
    """What training adapters over all the unquantized matrices shows: on the calibration's rows, judged on its other ones."""
    progress(0, len(shapes), "ranks: searching")
    levers = workload.levers if torch.cuda.is_available() else replace(workload.levers, device="cpu")
    plan = Plan({name: Spec(adapter=settings.adapter) for name in shapes}, model=str(folder), seed=settings.seed, levers=levers)
    model, _ = load_planned(plan)
    device = next(p.device for p in model.parameters() if p.requires_grad)
    task = calibration.task
    train, held_out = calibration.batches(calibration.rows), calibration.batches(calibration.others)
    rounds = min(len(train), len(held_out))

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return task.loss(model, {k: v.to(device) for k, v in batch.items()}) / max(tasks.labelled(batch, task), 1)

    with torch.enable_grad():
        scores = ranking.search(model, dict(hosts(model)), train[:rounds], held_out[:rounds], loss)
    progress(len(shapes), len(shapes), "ranks: searching")
    return scores
