"""One weight, one call."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid, WrongType
from finebits.formats.base import Format
from finebits.qtensor import QTensor
from finebits.quantizers.base import Quantizer
from finebits.quantizers.rtn import RTN
from finebits.stats.base import Stats


def quantize(W: Float[Tensor, "*e m n"], format: Format, quantizer: Quantizer | None = None, stats: Stats | None = None) -> QTensor:
    """W as a QTensor of the same shape: `q.dequantize()`, `q.nbytes`, `q.bits_per_weight`.

    Rounds to nearest unless another quantizer is given. Raises ValueError if W holds NaN or Inf, nothing or no values, or a scale does not fit
    its store, and TypeError if W is no dense tensor.

    >>> q = fb.quantize(torch.randn(8, 128), fb.NF(4, block=64))
    >>> tuple(q.shape), q.nbytes, q.bits_per_weight
    ((8, 128), 576, 4.5)
    """
    if not isinstance(W, Tensor) or isinstance(W, QTensor):
        came = f"is quantized already ({W.format}): dequantize it first" if isinstance(W, QTensor) else f"is a {type(W).__name__}"
        raise WrongType(f"a dense torch.Tensor is quantized, and the weight {came}")
    if W.ndim < 2 or not W.numel() or W.is_meta:
        what = "is on the meta device, where nothing has values" if W.is_meta else f"is {tuple(W.shape)}"
        raise Invalid(f"a matrix of values is quantized, (m, n) or several of them, and the weight {what}")
    return (quantizer or RTN())(W, format, stats or {})
