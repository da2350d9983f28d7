"""QLoRA: Efficient Finetuning of Quantized LLMs (NormalFloat).  Dettmers et al., NeurIPS 2023.  arXiv:2305.14314v1.

NF(b): quantiles of the normal distribution, absolute maximum 1 a block (section 3). With o = 0.9677083, Φ⁻¹ at 2^(b−1) + 1 equally
spaced probabilities from o down to 1/2 gives the positive half, at 2^(b−1) from o down to 1/2 the negative half, 0 once; all divided by
the maximum.

    s = max |w| over the block,    code = argmin_i |w/s − level_i|,    ŵ = level_code · s

Deviations: the 16 values of NF4 are the published table (its construction agrees to 1e-7). Blocks stay inside a row, where bitsandbytes
runs them over the flattened matrix; the values are the same when the block divides the row. Codes are chosen with the stored scale.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from finebits.formats._stores import Store
from finebits.formats.base import Format

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip


@functools.cache
def normal_float(bits: int, offset: float = 0.9677083) -> tuple[float, ...]:
    """The levels of NF(bits), ascending: 2^(b−1) − 1 negative, zero, 2^(b−1) positive.

    >>> [round(v, 4) for v in normal_float(2)]  # quantiles at .968 (both signs), 1/2 and .734, over the largest
    [-1.0, 0.0, 0.3379, 1.0]
    """
    half = 2 ** (bits - 1)
    quantile = lambda count: torch.special.ndtri(torch.linspace(offset, 0.5, count, dtype=torch.float64))[:-1]  # noqa: E731
    values = torch.cat([-quantile(half), torch.zeros(1, dtype=torch.float64), quantile(half + 1)]).sort().values
    return tuple((values / values.max()).float().tolist())


@dataclass(frozen=True)
class NF(Format):
    """NormalFloat of `bits` bits; `block` columns share one absmax scale, held in `scale`.

    >>> W = torch.tensor([[-2.0, 0.1, 0.7, 2.0]])
    >>> fb.quantize(W, fb.NF(4)).dequantize()  # 2 times the levels -1, .0796, .3379 and 1
    tensor([[-2.0000, 0.1592, 0.6758, 2.0000]])
    >>> fb.NF(4, block=64).storage_bits(4096, 4096) / 4096**2  # 4 for the code, 32/64 for the scale
    4.5
    """

    bits: int = 4
    block: int | str = 64
    scale: str | Store = "fp32"
    unit: int | None = None

    def levels(self) -> tuple[float, ...]:
        return NF4 if self.bits == 4 else normal_float(self.bits)
