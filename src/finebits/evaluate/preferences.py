"""What held-out answers say of a model that was to prefer some: how often it does, by how much, and the objective's own loss.

Accuracy is the share of pairs (or of single answers) whose margin is above 0; the margin is the objective's, of log-probabilities against those
of the reference. Intervals are 95%, by resampling pairs, as `heldout.table` resamples rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from finebits.evaluate.heldout import Scores
from finebits.evaluate.resampled import LEAST, RESAMPLES, SEED
from finebits.objectives.base import Objective, Said


def liked_only(scores: Scores, liked: Sequence[bool]) -> Scores:
    """The rows of answers that were wanted.

    >>> made = liked_only(Scores(nll=np.array([2.0, 4.0]), tokens=np.array([1.0, 2.0])), [True, False])
    >>> made.nll, made.tokens
    (array([2.]), array([1.]))
    """
    kept = np.asarray(liked, dtype=bool)
    return replace(scores, **{k: v[kept] for k, v in vars(scores).items() if v is not None})


def preferences(scores: Scores, reference: Scores, liked: Sequence[bool], objective: Objective) -> dict[str, list[float | None]]:
    """{"accuracy", "margin", "loss": [mean, low, high]} of answers in the order of their rows; of fewer than LEAST pairs there are no
    intervals. Where an objective asks for z, it is 0 here.

    >>> from finebits.objectives.dpo import DPO
    >>> rows = lambda *nll: Scores(nll=np.array(nll), tokens=np.ones(len(nll)))
    >>> made = preferences(rows(1.0, 3.0), rows(2.0, 2.0), [True, False], DPO(beta=0.5))  # β (1 + 1)
    >>> made["accuracy"], made["margin"]
    ([1.0, None, None], [1.0, None, None])
    """
    said = Said(torch.tensor(-scores.nll), torch.tensor(-reference.nll), torch.tensor(scores.tokens), torch.tensor([*liked]))
    margins = objective.margins(said).double().numpy()
    values = {"accuracy": (margins > 0).astype(np.float64), "margin": margins, "loss": objective.losses(said).double().numpy()}
    n = len(margins)
    counts = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n

    def spread(v: np.ndarray) -> list[float | None]:
        ends = [None, None] if n < LEAST else [float(q) for q in np.quantile(counts @ v, (0.025, 0.975))]
        return [float(v.mean()), *ends]

    return {k: spread(v) for k, v in values.items()}


def in_order(values: Any, lengths: Sequence[int]) -> np.ndarray:
    """Values of rows that were sorted by their length, the longest first, as the rows themselves lie.

    >>> in_order([10.0, 20.0, 30.0], lengths=[5, 9, 7])  # the second row is the longest
    array([30., 10., 20.])
    """
    placed = np.empty(len(lengths))
    placed[sorted(range(len(lengths)), key=lambda i: -lengths[i])] = values
    return placed
