"""Round to nearest: every weight to the nearest value of its block's grid. The baseline of all quantizers.

ŵ = decode(encode(w)),    |ŵ − w| minimal under the format's own scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits import kernels
from finebits.formats.base import Format, stored
from finebits.qtensor import QTensor
from finebits.quantizers.base import check_finite
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class RTN:
    """Round to nearest, in one fused pass over the matrix."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor:
        check_finite(W)
        codes, scale, shift = kernels.quantize(W, format.rounding(W.device))
        parts = {"codes": codes, "scale": stored(scale, format.scale)}
        if shift is not None:
            parts["shift"] = stored(shift, format.scale)
        return QTensor(parts, format, W.shape, W.dtype if W.is_floating_point() else torch.float32)
