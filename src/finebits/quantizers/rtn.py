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
from finebits.formats._stores import stored
from finebits.formats.base import Format
from finebits.qtensor import QTensor
from finebits.quantizers.base import check_finite
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class RTN:
    """Round to nearest: in one fused pass over the matrix where the format's scales are plain, else fit, then encode."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor:
        check_finite(W)
        dtype = W.dtype if W.is_floating_point() else torch.float32
        rounding = format.rounding(W.device)
        if rounding is None:
            scales = format.fit(W)
            codes = format.packed(W, format.scales(scales, W.shape[-1]))
            return QTensor({"codes": codes, **scales}, format, W.shape, dtype)
        codes, scale, shift = kernels.quantize(W, rounding)
        parts = {"codes": codes, "scale": stored(scale, rounding.store)}
        if shift is not None:
            parts["shift"] = stored(shift, rounding.store)
        return QTensor(parts, format, W.shape, dtype)
