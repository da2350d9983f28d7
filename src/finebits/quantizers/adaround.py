"""AdaRound: Up or Down? Adaptive Rounding for Post-Training Quantization.  Nagel et al., ICML 2020.  arXiv:2004.10568v2.

Under fixed scales every weight goes to one of the two levels around it, and which one is trained against the layer's output (eqs. 21 to 24):

    min_V  E ‖W x − Ŵ x‖² + λ Σ (1 − |2h(V) − 1|^β),    Ŵ = ⌊W⌋ + h(V)·(⌈W⌉ − ⌊W⌋),    h(V) = clip(σ(V)·(ζ − γ) + γ, 0, 1)

with ζ = 1.1 and γ = −0.1. β falls from 20 to 2, so that h is free at first and 0 or 1 in the end; then it is rounded.
Deviations: ⌊W⌋ and ⌈W⌉ are the neighbouring values of any grid, under scales from a search; the loss is tr (Ŵ − W) H (Ŵ − W)ᵀ with
H = R + damp·mean(diag R)·I and R = E x xᵀ, as one step of the whole batch, and is divided by each row's own loss under rounding to nearest,
so that λ means the same everywhere; layers are independent of one another (the paper feeds a layer with the quantized layers before it); a row
that rounding to nearest serves better (measured by R) keeps it; vector formats are rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.formats.base import Format, Parts, level_tensor
from finebits.qtensor import QTensor
from finebits.quantizers import _family as family
from finebits.quantizers.base import Quantizer
from finebits.stats.base import Statistic, Stats
from finebits.stats.gram import Gram

ZETA, GAMMA = 1.1, -0.1
BETA = (20.0, 2.0)
WARM = 0.2  # share of the steps without the regulariser


@dataclass(frozen=True)
class AdaRound(Quantizer):
    """Adam's steps and learning rate, and λ for the sum over a row.

    >>> x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])  # the last two inputs are always the same
    >>> gram = fb.Gram()
    >>> gram.add(x)
    >>> W = torch.tensor([[7.0, 0.48, 0.4]])
    >>> x @ fb.quantize(W, fb.Int(4), fb.AdaRound(), {fb.Gram: gram}).dequantize().mT  # one of them goes up; to nearest, .88 would become 0
    tensor([[7.], [1.]])
    """

    steps: int = 200
    lr: float = 0.05
    penalty: float = 0.01
    damp: float = 0.01
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})

    def __post_init__(self) -> None:
        family.check_training(self, "penalty")

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor:
        return family.trained(self, W, format, stats, lambda w, H: self._train(w, format, H))

    def _train(self, W: Float[Tensor, "m n"], format: Format, H: Float[Tensor, "n n"]) -> tuple[Tensor, Parts]:
        n = W.shape[-1]
        parts = family.search(format, W, H.diagonal())
        scales = format.scales(parts, n)
        nearest = format.encode(W, scales)
        levels = level_tensor(format.levels(), W.device).unique()
        Delta, z = format.spread(scales.scale.float(), n), 0.0 if scales.shift is None else format.spread(scales.shift.float(), n)
        u = (W - z) / torch.where(Delta != 0, Delta, 1.0)
        i = torch.bucketize(u, levels).clamp(1, len(levels) - 1)
        floor, ceil = levels[i - 1] * Delta + z, levels[i] * Delta + z
        gap = ceil - floor
        h = ((u - levels[i - 1]) / (levels[i] - levels[i - 1])).clamp(0.01, 0.99)
        V = torch.logit((h - GAMMA) / (ZETA - GAMMA))
        D = format.decode(nearest, scales) - W
        plain = (D @ H * D).sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        adam, product = family.Adam([V], [self.lr], (0.9, 0.999)), family.times(H)
        for step in range(self.steps):
            s = V.sigmoid()
            h = (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
            D = floor + h * gap - W
            grad = 2 * product(D) * gap / plain[:, None]
            t = (step / self.steps - WARM) / (1 - WARM)
            if t > 0:
                beta = BETA[1] + (BETA[0] - BETA[1]) * (1 - t)
                off = 2 * h - 1
                grad = grad - self.penalty * 2 * beta * off.abs() ** (beta - 1) * off.sign()
            adam.step([grad * ((h > 0) & (h < 1)) * (ZETA - GAMMA) * s * (1 - s)])
        h = V.sigmoid() * (ZETA - GAMMA) + GAMMA
        return format.encode(torch.where(h > 0.5, ceil, floor), scales), parts
