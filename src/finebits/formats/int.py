"""Uniform integers, symmetric and asymmetric, one scale a block.  Jacob et al., CVPR 2018.  arXiv:1712.05877v1.

With b bits and q the integer code, blocks of `block` columns:

    symmetric    ŵ = s·q,        s = max|w| / (2^(b−1) − 1),        q ∈ {−(2^(b−1) − 1) … 2^(b−1) − 1}   (restricted range)
    asymmetric   ŵ = s·q + l,    s = (max w − min w) / (2^b − 1),   q ∈ {0 … 2^b − 1},   l = min w

Deviations: the asymmetric zero point is the real minimum l, held beside the scale, as quantized checkpoints of language models do; an
integer zero point would force zero onto the grid. The unused symmetric code 2^b − 1 decodes as its neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.blocks import cut
from finebits.formats.base import Format, Parts, Scales, _constant, absmax, stored, width
from finebits.kernels.table import Rounding


@dataclass(frozen=True)
class Int(Format):
    """Integers of `bits` bits; `block` columns share a scale (and, asymmetric, a minimum), each held in `scale`."""

    bits: int = 4
    block: int = 64
    symmetric: bool = True
    scale: str = "fp32"
    widths: ClassVar = (2, 3, 4, 8)

    @property
    def top(self) -> int:
        """The largest code value at scale 1."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def levels(self) -> tuple[float, ...]:
        first = -self.top if self.symmetric else 0
        return tuple(float(min(first + i, self.top)) for i in range(2**self.bits))

    def rounding(self, device: torch.device) -> Rounding:
        mode, first = ("absmax", -self.top) if self.symmetric else ("minmax", 0)
        order = _constant(tuple(range(2**self.bits)), torch.uint8, str(device))
        mids = _constant((), torch.float32, str(device))
        return Rounding(mode, float(self.top), self.scale, True, first, mids, order, self.bits, self.block)

    def fit(self, W: Float[Tensor, "*r n"]) -> Parts:
        if self.symmetric:
            return {"scale": stored(absmax(W, self.block) / self.top, self.scale)}
        low = cut(W.float(), self.block, fill=torch.inf).amin(-1)
        high = cut(W.float(), self.block, fill=-torch.inf).amax(-1)
        return {"scale": stored((high - low) / self.top, self.scale), "shift": stored(low, self.scale)}

    def scales(self, parts: Parts) -> Scales:
        return Scales(parts["scale"], parts.get("shift"))

    def scale_bits(self) -> int:
        return width(self.scale) * (1 if self.symmetric else 2)
