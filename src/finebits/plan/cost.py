"""What a matrix costs and loses in every candidate format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.formats.base import Format
from finebits.plan.base import Option, Spec
from finebits.qtensor import dense
from finebits.quantizers.base import Quantizer
from finebits.stats.base import Stats


@dataclass(frozen=True)
class Cell:
    """One candidate for one matrix: exact bytes, and the relative error that it leaves."""

    format: Format | None
    bytes: int
    loss: float


def relative_error(W: Float[Tensor, "m n"], Q: Float[Tensor, "m n"], d: Float[Tensor, " n"] | None) -> float:
    """Σ d_j ‖(W − Q)_·j‖² / Σ d_j ‖W_·j‖², with d_j the mean square of input j; unweighted if d is None. 0 for a zero matrix."""
    error, norm = (W - Q).square_().sum(0, dtype=torch.float64), W.square().sum(0, dtype=torch.float64)
    if d is not None:
        error, norm = error * d, norm * d
    return float(error.sum() / norm.sum()) if float(norm.sum()) > 0 else 0.0


def row(
    W: Float[Tensor, "m n"], formats: Sequence[Format | None], quantizer: Quantizer, stats: Stats, d: Tensor | None, dense_width: int
) -> list[Cell]:
    """Every candidate for one matrix. A candidate None keeps it dense at `dense_width` bytes a number."""
    W = W.float()
    cells = []
    for format in formats:
        if format is None:
            cells.append(Cell(None, W.numel() * dense_width, 0.0))
            continue
        q = quantizer(W, format, stats)
        size = format.storage_bits(*W.shape) // 8
        assert q.nbytes == size, (format, q.nbytes, size)
        cells.append(Cell(format, size, relative_error(W, dense(q, torch.float32), d)))
    return cells


def options(cells: Sequence[Cell], spec: Callable[[Format | None], Spec]) -> list[Option]:
    """The menu of one matrix."""
    return [Option(spec(c.format), c.bytes, c.loss) for c in cells]
