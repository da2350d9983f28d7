"""HQQ: Half-Quadratic Quantization of Large Machine Learning Models.  Badri and Shaji, Mobius Labs, 2023.  mobiusml.github.io/hqq_blog.

Without data: the shift of every block for which the error is sparse, min_z φ(W − Ŵ) with φ the ℓ_p "norm", p < 1, by alternating

    W_e ← shrink(W − Ŵ, β),   shrink(x, β) = sign(x)·max(|x| − |x|^(p−1)/β, 0)         (sp1: what is taken for an outlier's error)
    z   ← mean over the block of (W − W_e − s·q)                                       (sp2: the shift that suits the rest)
    β   ← κβ

with the codes q taken anew under every z. The iterate with the least Σ|W − Ŵ| is kept, as the authors' early stop does.
Deviations: ŵ = s·q + z here, s·(q − z) there; the iteration runs to its end and each block keeps its own best, where the code stops all of
them together; in formats without a shift the scale moves in its place, s ← ⟨W − W_e, q⟩/⟨q, q⟩; errors are measured in units of the
block's scale, so that β means the same for every weight. Since May 2025 the code forgets to let β grow. Vector formats keep their own fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats.base import Format, Scales
from finebits.qtensor import QTensor
from finebits.quantizers import _family as family
from finebits.quantizers.base import Quantizer, check_finite
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class HQQ(Quantizer):
    """The norm's p, the penalty β and its growth κ, and the number of alternations.

    >>> W = torch.tensor([[0.0, 1.1, 2.1, 3.1, 1.1, 2.1]])
    >>> fb.quantize(W, fb.Int(2, symmetric=False)).dequantize()  # four values from the least weight to the largest: off by .2 together
    tensor([[0.0000, 1.0333, 2.0667, 3.1000, 1.0333, 2.0667]])
    >>> fb.quantize(W, fb.Int(2, symmetric=False), fb.HQQ()).dequantize()  # moved by 1/30: off by .133, two of six not at all
    tensor([[0.0333, 1.0667, 2.1000, 3.1333, 1.0667, 2.1000]])
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20
    norm: ClassVar[int] = 1  # of the error that it makes small
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()

    def __post_init__(self) -> None:
        if not (0 < self.p <= 1 and self.beta > 0 and self.kappa >= 1 and self.steps >= 0):
            raise Invalid(f"HQQ needs 0 < p <= 1, beta > 0, kappa >= 1 and steps >= 0; got {self}")

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor:
        check_finite(W)
        return family.experts(W, lambda w: self._matrix(w, format))

    def _matrix(self, W: Float[Tensor, "m n"], format: Format) -> QTensor:
        plain = family.plain(W, format)
        if family.is_vector(format):
            return plain
        w, n = W.float(), W.shape[-1]
        per = lambda x: format.cut(x).sum(-1)  # noqa: E731
        count = per(torch.ones_like(w))
        scale, shift = format.ideal(w)[:2]
        best = best_scales = None
        beta = self.beta
        for _ in range(self.steps + 1):
            as_stored = format.scales(format.hold(Scales(scale, shift), w), n)
            codes = format.encode(w, as_stored)
            V = format.decode(codes, as_stored)
            loss = per((w - V).abs())
            if best is None or best_scales is None:
                best, best_scales = loss, Scales(scale, shift)
            else:
                less = loss < best
                best = torch.where(less, loss, best)
                moved = None if shift is None or best_scales.shift is None else torch.where(less, shift, best_scales.shift)
                best_scales = Scales(torch.where(less, scale, best_scales.scale), moved)
            unit = format.spread(scale.abs().clamp_min(torch.finfo(torch.float32).tiny), n)
            x = (w - V) / unit
            W_e = x.sign() * (x.abs() - x.abs().clamp_min(1e-8) ** (self.p - 1) / beta).clamp_min(0) * unit
            if shift is None or as_stored.shift is None:
                step = per((w - W_e) * V) / per(V * V).clamp_min(torch.finfo(torch.float32).tiny)
                scale = torch.where(step > 0, scale * step, scale)
            else:
                shift = per(w - W_e - (V - format.spread(as_stored.shift.float(), n))) / count
            beta *= self.kappa
        assert best_scales is not None
        parts = format.hold(best_scales, w)
        codes = format.packed(w, format.scales(parts, n))
        q = QTensor({"codes": codes, **parts}, format, W.shape, family.dtype_of(W))
        return family.better(q, plain, lambda q: (q.dequantize(torch.float32) - w).abs().sum(-1))
