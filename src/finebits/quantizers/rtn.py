"""Round to nearest: every weight to the nearest value of its block's grid. The baseline of all quantizers.

ŵ = decode(encode(w)),    |ŵ − w| minimal under the format's own scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.formats.base import Format
from finebits.qtensor import QTensor
from finebits.quantizers._family import plain
from finebits.quantizers.base import Quantizer, check_finite
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class RTN(Quantizer):
    """Round to nearest: in one fused pass over the matrix where the format's scales are plain, else fit, then encode.

    >>> W = torch.tensor([[7.0, 0.4, 0.4]])
    >>> fb.quantize(W, fb.Int(4), fb.RTN()).dequantize()  # the scale is 1
    tensor([[7., 0., 0.]])
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    nearest: ClassVar[bool] = True

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor:
        check_finite(W)
        return plain(W, format)
