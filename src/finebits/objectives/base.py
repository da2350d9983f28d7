"""What an objective is: a loss of whole answers, out of what the model and a reference say of them.

Where a task's own loss is a sum over labels, these compare answers: log π(y | x), the sum of the log-probabilities of an answer's labels, is all
that they are given, beside how many labels there are, the same of the reference, and which answers were wanted. Of a pair the answer that was
liked more stands before the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from finebits.errors import Invalid


@dataclass(frozen=True)
class Said:
    """Of every answer: log π(y | x), the same of the reference, how many labels it has, and whether it was wanted; and z, how far the model is
    from the reference on answers to other prompts.

    >>> Said.of([-2.0, -3.0], [-2.5, -2.5]).ratio  # log π(y | x) − log π_ref(y | x)
    tensor([ 0.5000, -0.5000])
    """

    own: Tensor  # (r,)
    reference: Tensor  # (r,); zeros where the objective has none
    tokens: Tensor  # (r,)
    liked: Tensor  # (r,) bool
    z: float = 0.0

    @classmethod
    def of(
        cls,
        own: Iterable[float],
        reference: Iterable[float],
        tokens: Iterable[int] | None = None,
        liked: Iterable[bool] | None = None,
        z: float = 0.0,
    ) -> Said:
        """Out of numbers; answers are liked and not in turn, and have one label, where nobody says."""
        sums = torch.tensor([*own])
        counts = torch.ones(len(sums)) if tokens is None else torch.tensor([*tokens])
        wanted = torch.arange(len(sums)) % 2 == 0 if liked is None else torch.tensor([*liked])
        return cls(sums, torch.tensor([*reference]), counts, wanted, z)

    @property
    def ratio(self) -> Tensor:
        """log π(y | x) − log π_ref(y | x)."""
        return self.own - self.reference

    @property
    def mean(self) -> Tensor:
        """log π(y | x) / |y|."""
        return self.own / self.tokens.clamp(min=1)


@runtime_checkable
class Objective(Protocol):
    """A frozen dataclass of settings; holds no tensors."""

    together: ClassVar[int]  # rows that it compares: 2 of a pair, or 1
    reference: Literal["start", "base", None]  # what the model is compared with: as it starts, its base alone, nothing
    shifted: ClassVar[bool]  # is it to know what the model says of answers to other prompts?

    def losses(self, said: Said) -> Tensor: ...  # (r / together,)
    def margins(self, said: Said) -> Tensor: ...  # (r / together,): above 0 where what was wanted is preferred


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of pairs, what was liked more and the other.

    >>> halves(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    (tensor([1., 3.]), tensor([2., 4.]))
    """
    return x[0::2], x[1::2]


def share(value: float, name: str, least: float = 0.0, below: float = float("inf")) -> None:
    """Raises Invalid unless least < value < below, or value is `least` where that is 0 and there is an upper end.

    >>> share(0.1, "dpo.beta")
    >>> share(0.0, "dpo.beta")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: dpo.beta is 0, and a number above 0 is wanted
    """
    ended = below < float("inf")
    if not ((value >= least if ended else value > least) and value < below):
        wanted = f"from {least:g} up to (not including) {below:g}" if ended else f"above {least:g}"
        raise Invalid(f"{name} is {value:g}, and a number {wanted} is wanted")


def fits(objective: Any, rows: Iterable[Any], path: str, learned: bool = True) -> None:
    """Raises Invalid where rows (with `rejected` and `liked`, of finebits.data.rows) are not what is learned from: one answer each, pairs, or
    answers that are wanted and answers that are not, of which there must be both where they are `learned`.

    >>> from finebits.data.rows import Row
    >>> fits(None, [Row(1, text="yes")], "a.jsonl")
    >>> fits(None, [Row(1, text="yes", rejected=Row(1, text="no", liked=False))], "a.jsonl")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: a.jsonl holds pairs of answers, which no plain loss learns from: set training.loss to dpo or orpo
    """
    rows = list(rows)
    pairs = sum(row.rejected is not None for row in rows)
    unwanted = sum(not row.liked for row in rows)
    name = None if objective is None else type(objective).__module__.rsplit(".", 1)[-1]
    if pairs and (objective is None or objective.together == 1):
        who = "which no plain loss learns from" if name is None else f"and {name} learns from single ones"
        raise Invalid(f"{path} holds pairs of answers, {who}: set training.loss to dpo or orpo")
    if unwanted and objective is None:
        raise Invalid(f"{path} holds answers that were not wanted, which no plain loss learns from: set training.loss to kto")
    if objective is not None and objective.together == 2 and pairs < len(rows):
        raise Invalid(f'{path} holds rows without a second answer, and {name} learns from pairs: give keys "chosen" and "rejected"')
    if objective is not None and objective.shifted and learned and (len(rows) < 2 or unwanted in (0, len(rows))):
        what = f"{len(rows)} answer{'s' if len(rows) != 1 else ''}, {unwanted} of them not wanted"
        raise Invalid(f"{path} holds {what}, and {name} learns from both kinds: give some of each")
