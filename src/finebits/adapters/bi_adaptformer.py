"""Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy (Bi-AdaptFormer).
Jie et al., ICCV 2023.  arXiv:2307.16867v1.  Over AdaptFormer: Chen et al., NeurIPS 2022, arXiv:2205.13535v3.
Use it where an update may bend and must be smallest: beside feed-forward sublayers, in one bit a number; where it must merge, take `one_bit`.

    y = FFN(x) + s·Ŵ_up ReLU(Ŵ_down x),    W_down ∈ ℝ^{h×d},  W_up ∈ ℝ^{d×h}

Ŵ is W in one bit a number, or two, with the mean and the deviation of the whole factor, trained as in `one_bit`. A saved adapter holds
⌈bits·h·d/8⌉ bytes and μ and σ for each of the two. s is searched over .01, .1, 1, 10, 100; h is 32, or 1.
At birth W_down is uniform in ±1/√d and W_up Gaussian with deviation .001: zeros would have no signs, so the update is small and not zero.
Deviations: AdaptFormer's norm and biases are left out, as the sizes that the paper counts have none; a recipe's dropout is of x, where theirs is
of the units inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters import _coarse
from finebits.adapters._coarse import coarse
from finebits.adapters._family import Usual
from finebits.adapters.base import FeedForward, Form, Params, Place, complete
from finebits.errors import Invalid


@dataclass(frozen=True)
class BiAdaptFormer(Usual):
    """A parallel branch of `units` beside every feed-forward sublayer, whose factors are computed with in one bit a number, or two.

    >>> adapter = fb.BiAdaptFormer(units=32)
    >>> adapter.size(3072, 768)  # trained numbers over a sublayer of ViT-B, which a file holds in 6 KiB and four numbers
    49152
    """

    units: int = 32
    bits: Literal[1, 2] = 1
    scale: float = 1.0
    rank: ClassVar[int] = 0
    form: ClassVar[Form] = "beside"
    over: ClassVar[Place] = "feed_forward"
    kept: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    identity_at_birth: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _coarse.check_bits(self.bits)
        if self.units < 1 or not self.scale > 0:
            raise Invalid(f"bi_adaptformer needs units >= 1 and scale > 0; got units {self.units} and scale {self.scale}")

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"down": (self.units, n), "up": (n, self.units)}

    def params(self, base: FeedForward, gen: Generator, start: Params) -> Params:
        h, d = self.units, base.shape[1]
        down = (torch.rand(h, d, generator=gen) * 2 - 1) / math.sqrt(d)
        return complete({"down": down, "up": 0.001 * torch.randn(d, h, generator=gen)}, start, "BiAdaptFormer")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: FeedForward) -> Float[Tensor, "*t n"]:
        down, up = (coarse(p[k], self.bits).to(x.dtype) for k in ("down", "up"))
        return base(x) + F.linear(F.relu(F.linear(base.drop(x), down)), self.scale * up)

    def packed(self, p: Params) -> Params:
        return _coarse.packed(p, self.bits)

    def unpacked(self, p: Params, m: int, n: int) -> Params:
        return _coarse.unpacked(p, self.shapes(m, n), self.bits)
