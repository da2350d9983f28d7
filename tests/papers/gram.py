"""Statistics of made-up inputs for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finebits.stats.base import Statistic


def seen(X: Tensor, G: Tensor | None, *wanted: type[Statistic]) -> dict[type[Statistic], Any]:
    """The wanted statistics of inputs X (t, n) and output gradients G (t, m)."""
    found: dict[type[Statistic], Any] = {S: S() for S in wanted}
    for S, s in found.items():
        s.add(X, G if S.backward else None)
    return found


def inputs(t: int, n: int, decay: float = 1.5) -> Tensor:
    """Correlated inputs whose features are of unequal size."""
    return torch.randn(t, n) @ torch.randn(n, n) * torch.logspace(0, -decay, n)


def output_error(V: Tensor, W: Tensor, R: Tensor) -> float:
    """E ‖(V − W) x‖²."""
    return float(((V - W).double() @ R.double() * (V - W).double()).sum())
