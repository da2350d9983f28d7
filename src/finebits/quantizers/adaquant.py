"""AdaQuant: Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming.  Hubara et al., ICML 2021.
arXiv:2006.10518v2.

Weights, scales and zero points of a layer are trained together against its output (eq. 4), V unconstrained, by Adam:

    min_{V, Δ, z}  E ‖W x − Q_{Δ,z}(W + V) x‖² = tr (Ŵ − W) R (Ŵ − W)ᵀ,    Ŵ = Δ·level(u) + z,  u = (W + V − z)/Δ,  R = E x xᵀ

with the straight-through gradients, in = 1 where u lies inside the grid and 0 outside:

    ∂ŵ/∂v = in,    ∂ŵ/∂Δ = level(u) − in·u,    ∂ŵ/∂z = 1 − in

Deviations:
- activations are not quantized, so that R holds all that the loss needs of the calibration rows, and every step is one of the whole batch;
  R + damp·mean(diag R)·I keeps V small where there are fewer rows than columns;
- V, Δ and z are trained in units of the block's first scale, which comes from a search, over fewer steps under a shorter memory of gradients
  (β₁ = 0.5, β₂ = 0.99; the steps are exact gradients, so that there is little to average), and the learning rates fall to zero; the authors'
  rates are for weights as they come, over 1000 steps;
- each row keeps its best iterate, or rounding to nearest where that serves R better; vector formats are rounded to nearest;
- the bias is not trained here, since a quantizer gives back a weight: refinement `bias_tuning` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.formats.base import Format, Parts, Scales
from finebits.qtensor import QTensor
from finebits.quantizers import _family as family
from finebits.quantizers.base import Quantizer
from finebits.stats.base import Statistic, Stats
from finebits.stats.gram import Gram

BETAS = (0.5, 0.99)


@dataclass(frozen=True)
class AdaQuant(Quantizer):
    """Adam's steps, and its learning rates for weights (`lr`) and for scales and zero points (`lr_range`), in units of a block's scale.

    >>> x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])  # the last two inputs are always the same
    >>> gram = fb.Gram()
    >>> gram.add(x)
    >>> W = torch.tensor([[7.0, 0.4, 0.3]])
    >>> (x @ fb.quantize(W, fb.Int(4), fb.AdaQuant(), {fb.Gram: gram}).dequantize().mT).round()  # to nearest, .7 would become 0
    tensor([[7.], [1.]])
    """

    steps: int = 100
    lr: float = 0.015
    lr_range: float = 0.006
    damp: float = 0.01
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})

    def __post_init__(self) -> None:
        family.check_training(self, "lr_range")

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor:
        return family.trained(self, W, format, stats, lambda w, H: self._train(w, format, H))

    def _train(self, W: Float[Tensor, "m n"], format: Format, H: Float[Tensor, "n n"]) -> tuple[Tensor, Parts]:
        n = W.shape[-1]
        level, low, high = family.levels(format, W.device)
        per = lambda x: format.cut(x).sum(-1)  # noqa: E731
        tiny = torch.finfo(torch.float32).tiny
        first = family.searched(format, W, H.diagonal())
        unit, at = first.scale.abs(), format.spread(first.scale.abs(), n)
        V, Delta, z = torch.zeros_like(W), torch.zeros_like(unit), torch.zeros_like(unit)  # in units of `unit`
        trained = [V, Delta] if first.shift is None else [V, Delta, z]
        adam = family.Adam(trained, (self.lr, self.lr_range, self.lr_range)[: len(trained)], BETAS)
        product = family.times(H)
        best = W.new_full((len(W),), torch.inf)
        kept = [t.clone() for t in trained]
        moved = lambda Delta, z: Scales(first.scale + Delta * unit, None if first.shift is None else first.shift + z * unit)  # noqa: E731
        for t in range(self.steps + 1):
            scale, shift, _ = format.scales(format.hold(moved(Delta, z), W), n)
            inverse = torch.where(scale.abs() > tiny, 1 / scale.float(), 0.0)
            D, u = format.spread(scale.float(), n), torch.addcmul(W, V, at)
            if shift is not None:
                shift = format.spread(shift.float(), n)
                u -= shift
            u *= format.spread(inverse, n)
            q = level(u)
            D = (q * D if shift is None else torch.addcmul(shift, q, D)).sub_(W)  # Ŵ − W
            G = product(D)
            better = family.improved(format, torch.linalg.vecdot(D, G), best)
            for old, new in zip(kept, trained, strict=True):
                old[better] = new[better]
            inside = G * (u.clamp(low, high) == u)
            grads = [inside * at, (per(q.mul_(G)) - per(u.mul_(inside))) * unit, per(G - inside) * unit]
            adam.step(grads[: len(trained)], 1 - t / (self.steps + 1))
        V, Delta, *rest = kept
        parts = format.hold(moved(Delta, *(rest or [z])), W)
        return format.encode(torch.addcmul(W, V, at), format.scales(parts, n)), parts
