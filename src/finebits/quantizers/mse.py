"""Scale search: for every block the scale with the least squared error, not the one that reaches the largest weight.
LSQ's and OMSE's simplest form: Choukroun et al., Low-bit Quantization of Neural Networks for Efficient Inference, 2019.  arXiv:1902.06822v2.

    Δ* = argmin_Δ Σ_j d_j (Q_Δ(w_j) − w_j)²,        codes to nearest

d_j = 1 (the paper's), or with weighting="inputs" the mean square of input j: then it is the output error of inputs without correlation.
Deviations: five multiples of the format's own scale in the place of a line search, and from the best of them three rounds of codes to nearest,
then the scale that is the least squares answer to these codes (and the minimum, in formats that have one, which the paper has not); a row
that the format's own scales serve better (where a second level holds them) keeps those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.linalg import check_statistic
from finebits.qtensor import QTensor
from finebits.quantizers import _family as family
from finebits.quantizers.base import Quantizer, check_finite
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.mean_square import MeanSquare


@dataclass(frozen=True)
class MSE(Quantizer):
    """`weighting` is "none" or "inputs".

    >>> W = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 3.0]])
    >>> fb.quantize(W, fb.Int(2)).dequantize()  # −1, 0 and 1 times the largest weight: the squared error is 5
    tensor([[0., 0., 0., 0., 0., 3.]])
    >>> fb.quantize(W, fb.Int(2), fb.MSE()).dequantize()  # times 4/3, the mean: 10/3
    tensor([[1.3333, 1.3333, 1.3333, 1.3333, 1.3333, 1.3333]])
    """

    weighting: Literal["none", "inputs"] = "none"

    def __post_init__(self) -> None:
        if self.weighting not in ("none", "inputs"):
            raise Invalid(f"weighting is {self.weighting!r}; it can be 'none' or 'inputs'")

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The mean square of the inputs, if they weigh."""
        return frozenset({MeanSquare}) if self.weighting == "inputs" else frozenset()

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor:
        check_finite(W)
        d = torch.ones(W.shape[-1], device=W.device)
        if self.weighting == "inputs":
            d = need(stats, MeanSquare, "MSE(weighting='inputs')").to(W.device)
            if d.shape != W.shape[-1:]:
                raise Invalid(f"MeanSquare has {len(d)} inputs and the weight {W.shape[-1]}: the statistics are another module's")
            check_statistic(d)

        def one(W: Tensor) -> QTensor:
            parts = family.search(format, W, d)
            codes = format.packed(W, format.scales(parts, W.shape[-1]))
            q = QTensor({"codes": codes, **parts}, format, W.shape, family.dtype_of(W))
            return family.better(q, family.plain(W, format), lambda q: ((q.dequantize(torch.float32) - W.float()).square() * d).sum(-1))

        return family.experts(W, one)
