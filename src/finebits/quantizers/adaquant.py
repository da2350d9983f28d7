"""AdaQuant: Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming.  Hubara et al., ICML 2021.
arXiv:2006.10518v2.

Weights, scales and zero points of a layer are trained together against its output (eq. 4), V unconstrained, by Adam:

    min_{V, Δ, z}  E ‖W x − Q_{Δ,z}(W + V) x‖² = tr (Ŵ − W) R (Ŵ − W)ᵀ,    Ŵ = Δ·level(u) + z,  u = (W + V − z)/Δ,  R = E x xᵀ

with the straight-through gradients, in = 1 where u lies inside the grid and 0 outside:

    ∂ŵ/∂v = in,    ∂ŵ/∂Δ = level(u) − in·u,    ∂ŵ/∂z = 1 − in

Deviations:
- activations are not quantized, so that R holds all that the loss needs of the calibration rows, and every step is one of the whole batch;
  R + damp·mean(diag R)·I keeps V small where there are fewer rows than columns;
- V, Δ and z are trained in units of the block's first scale, which comes from a search, and the learning rates fall to zero; the authors'
  rates are for weights as they come, over 1000 steps;
- each row keeps its best iterate, or rounding to nearest where that serves R better; vector formats are rounded to nearest;
- the bias is not trained here, since a quantizer gives back a weight: `lrec.py` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.formats.base import Format, Parts, Scales, level_tensor
from finebits.qtensor import QTensor
from finebits.quantizers import _family as family
from finebits.stats.base import Statistic, Stats
from finebits.stats.gram import Gram


@dataclass(frozen=True)
class AdaQuant:
    """Adam's steps, and its learning rates for weights (`lr`) and for scales and zero points (`lr_range`), in units of a block's scale."""

    steps: int = 200
    lr: float = 0.01
    lr_range: float = 0.005
    damp: float = 0.01
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})

    def __post_init__(self) -> None:
        if not (self.steps >= 0 and self.lr > 0 and self.lr_range >= 0 and self.damp >= 0):
            raise ValueError(f"AdaQuant needs steps >= 0, lr > 0, lr_range >= 0 and damp >= 0; got {self}")

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor:
        return family.calibrated(W, format, stats, "AdaQuant", lambda w, R: self._train(w, format, family.damped(R, self.damp)))

    def _train(self, W: Float[Tensor, "m n"], format: Format, H: Float[Tensor, "n n"]) -> tuple[Tensor, Parts]:
        n = W.shape[-1]
        if family.is_vector(format):
            parts = format.fit(W)
            return format.encode(W, format.scales(parts, n)), parts
        low, high = level_tensor(format.levels(), W.device).aminmax()
        per = lambda x: format.cut(x).sum(-1)  # noqa: E731
        tiny = torch.finfo(torch.float32).tiny
        scale, shift = family.searched(format, W, H.diagonal())[:2]
        unit, at = scale.abs(), format.spread(scale.abs(), n)
        trained = [torch.zeros_like(W), torch.zeros_like(scale), *([] if shift is None else [torch.zeros_like(shift)])]  # V, Δ, z
        adam = torch.optim.Adam([{"params": trained[:1], "lr": self.lr}, {"params": trained[1:], "lr": self.lr_range}])
        falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 1 - t / (self.steps + 1))
        best: Tensor | None = None
        kept = target, held = W, Scales(scale, shift)
        for _ in range(self.steps + 1):
            target = W + trained[0] * at
            held = Scales(scale + trained[1] * unit, None if shift is None else shift + trained[2] * unit)
            used = format.scales(format.hold(held, W), n)
            Delta = format.spread(used.scale.float(), n)
            z = 0.0 if used.shift is None else format.spread(used.shift.float(), n)
            V = format.decode(format.encode(target, used), used)
            G = (V - W) @ H
            loss = ((V - W) * G).sum(-1, keepdim=True)
            loss = loss.sum().expand(1, 1) if family.together(format) else loss
            if best is None:
                best, kept = loss, (target, held)
            else:
                less = loss < best
                best = torch.where(less, loss, best)
                moved = None if held.shift is None or kept[1].shift is None else torch.where(less, held.shift, kept[1].shift)
                kept = torch.where(less, target, kept[0]), Scales(torch.where(less, held.scale, kept[1].scale), moved)
            safe = torch.where(Delta.abs() > tiny, Delta, 1.0)
            u = (target - z) / safe
            inside = (u >= low) & (u <= high)
            trained[0].grad = G * inside * at
            trained[1].grad = per(G * ((V - z) / safe - inside * u)) * unit
            if shift is not None:
                trained[2].grad = per(G * ~inside) * unit
            adam.step()
            falling.step()
        parts = format.hold(kept[1], W)
        return format.encode(kept[0], format.scales(parts, n)), parts
