"""What a quantizer is: a weight, a format and statistics -> a quantized weight. It never knows which model fed it."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.qtensor import QTensor
from finebits.stats.base import Statistic, Stats


@runtime_checkable
class Quantizer(Protocol):
    """A frozen dataclass of settings with this call."""

    needs: ClassVar[frozenset[type[Statistic]]]
    nearest: ClassVar[bool] = False  # is every weight rounded to nearest, under the format's own scale?

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor: ...


def check_finite(W: Tensor, what: str = "the weight", why: str = "cannot be quantized") -> None:
    """Raise if W holds NaN or Inf, and say why that is wrong.

    >>> check_finite(torch.tensor([[1.0, torch.inf]]), "q_proj.weight")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: q_proj.weight holds inf at [0, 1]: a weight with NaN or Inf cannot be quantized; check the checkpoint
    """
    if not torch.isfinite(W.sum(dtype=torch.float32)) and not torch.isfinite(W).all():
        bad = (~torch.isfinite(W)).nonzero()[0].tolist()
        raise Invalid(f"{what} holds {W[tuple(bad)].item()} at {bad}: a weight with NaN or Inf {why}; check the checkpoint")
