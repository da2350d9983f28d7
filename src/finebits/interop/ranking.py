"""Ranks that are given out before any bits are chosen, by what the weights are and what the rows show of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finebits.build import Progress
from finebits.interop.checkpoint import Tensors
from finebits.interop.pricing import Calibration
from finebits.interop.selecting import Mistake, Shape
from finebits.quantizers.base import check_finite
from finebits.ranks.base import adapters

if TYPE_CHECKING:
    from finebits.recipe.settings import Settings


def given_out(
    settings: Settings, folder: Path, shapes: Mapping[str, Shape], data: Any, levers: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """The adapter of every matrix as `settings.ranking` has it, None for one that gets no rank. The statistics of one block are there at a
    time. Raises Mistake where the ranking asks for what rows show and there are none."""
    ranking, adapter = settings.ranking, settings.adapter
    if ranking.needs and data is None:
        raise Mistake(f"{type(ranking).__name__} gives out ranks by what calibration rows show, and there are none: name data.datasets")
    calibration = Calibration(folder, data, levers) if ranking.needs else None
    found = iter([dict.fromkeys(shapes, {})]) if calibration is None else calibration.statistics(dict.fromkeys(shapes, ranking.needs))
    tensors, scores = Tensors(folder), dict[str, Any]()
    for seen in found:
        for name, stats in seen.items():
            W = tensors[f"{name}.weight"]
            check_finite(W, f"{name}.weight")
            scores[name] = ranking.score(W.float(), adapter, stats)
            progress(len(scores), len(shapes), f"ranks: {name}")
    return adapters(ranking, {name: scores[name] for name in shapes}, adapter, shapes)
