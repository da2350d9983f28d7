"""One weight, one call."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from finebits.formats.base import Format
from finebits.qtensor import QTensor
from finebits.quantizers.base import Quantizer
from finebits.quantizers.rtn import RTN
from finebits.stats.base import Stats


def quantize(W: Float[Tensor, "*e m n"], format: Format, quantizer: Quantizer | None = None, stats: Stats | None = None) -> QTensor:
    """W as a QTensor of the same shape: `q.dequantize()`, `q.nbytes`, `q.bits_per_weight`.

    Rounds to nearest unless another quantizer is given. Raises ValueError if W holds NaN or Inf, or a scale does not fit its store.

    >>> q = fb.quantize(torch.randn(8, 128), fb.NF(4, block=64))
    >>> tuple(q.shape), q.nbytes, q.bits_per_weight
    ((8, 128), 576, 4.5)
    """
    return (quantizer or RTN())(W, format, stats or {})
