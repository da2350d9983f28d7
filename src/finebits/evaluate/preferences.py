"""What held-out answers say of a model that was to prefer some: how often it does, by how much, and the objective's own loss.

Accuracy is the share of pairs (or of single answers) whose margin is above 0; the margin is the objective's, of log-probabilities against those
of the reference. Intervals are 95%, by resampling pairs, as `heldout.table` resamples rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from finebits.data.arrays import Tokens
from finebits.evaluate.heldout import Scores
from finebits.evaluate.resampled import LEAST, RESAMPLES, SEED
from finebits.objectives.base import Objective, Said
from finebits.objectives.dpo import DPO


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


def paired(rows: Tokens) -> bool:
    """Does an answer that was not wanted follow every one that was?

    >>> from finebits.data.arrays import Example
    >>> rows = [Example([5, 6], [-100, 6], 1), Example([5, 7], [-100, 7], 1, liked=False)]
    >>> paired(Tokens.of(rows, 2, True)), paired(Tokens.of(rows[:1], 2, True))
    (True, False)
    """
    return len(rows) % 2 == 0 and rows.unwanted == {*range(1, len(rows), 2)}


def of_answers(
    scores: Mapping[str, Scores],
    rows: Tokens,
    made: Callable[[dict[str, Scores]], dict[str, Any]],
    objective: Objective | None = None,
    start: Callable[[str], str] = lambda key: "",
) -> dict[str, Any]:
    """The table that is `made` of the answers that were wanted, and beside every entry how it prefers them: by the `objective` against the entry
    that `start` names, where that was scored; where no objective says it, and the rows are pairs, by log π(y | x) alone, whose difference in a
    pair is the margin. Scores come in the order of `batched`.

    >>> from finebits.data.arrays import Example
    >>> rows = Tokens.of([Example([5, 6], [-100, 6], 1), Example([5, 7], [-100, 7], 1, liked=False)], 2, True)
    >>> scores = {"none": Scores(nll=np.array([1.0, 3.0]), tokens=np.ones(2))}
    >>> made = of_answers(scores, rows, lambda kept: {"entries": [{"key": k, "loss": s.loss} for k, s in kept.items()]})
    >>> made["entries"][0]["loss"], made["entries"][0]["preference"]["margin"][0]
    (1.0, 2.0)
    """
    liked = [i not in rows.unwanted for i in range(len(rows))]
    laid = {k: replace(s, **{n: in_order(v, rows.lengths) for n, v in vars(s).items() if v is not None}) for k, s in scores.items()}
    result = made({k: liked_only(s, liked) for k, s in laid.items()})
    alone = objective is None or (objective.together == 2 and not paired(rows))
    nothing = Scores(np.zeros(len(rows)), np.ones(len(rows)))
    for entry in result["entries"]:
        reference = nothing if alone else laid.get(start(entry["key"]))
        by = cast(Objective, DPO(beta=1.0)) if alone or objective is None else objective
        if reference is not None and not (alone and not paired(rows)):
            entry["preference"] = preferences(laid[entry["key"]], reference, liked, by)
    return result
