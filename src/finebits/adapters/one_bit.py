"""Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy (Bi-LoRA).
Jie et al., ICCV 2023.  arXiv:2307.16867v1.
Use it where what is stored for a task must be smallest: at equal bytes, many directions of one bit learn more than one of 32.

    W′ = W + s·B̂ Â,    ŵ = value(v)·σ + μ,    v = (w − μ)/(σ + 10⁻⁵),    s = α/r

μ and σ (unbiased) are those of a whole factor; value is the nearest quantile median of N(0, 1), ±.6745 for one bit (finebits.formats.median).
Gradients pass through `value` as if it were the identity, and through μ and σ.
At birth A is uniform in ±1/√n and B Gaussian with deviation .001: a factor of zeros has no signs, so that the update is small and not zero.
A saved adapter holds ⌈bits·numbers/8⌉ bytes a factor and its μ and σ, and comes back to the bit.
Deviations: μ and σ are computed with in steps of σ/4096, so that weights of the same codes, mean and deviation are the same adapter; the authors
draw B from a Gaussian that is cut at ±2, which is further out than any of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import LowRank
from finebits.adapters.base import Layer, Params, complete
from finebits.blocks import pack, unpack
from finebits.errors import Invalid
from finebits.formats._medians import medians
from finebits.formats.base import level_tensor

LEVELS = {bits: medians(bits) for bits in (1, 2)}
STEPS = 2**12


@dataclass(frozen=True)
class OneBit(LowRank):
    """A low-rank update whose factors are computed with in one bit a number, or two.

    >>> p = {"B": torch.tensor([[2.0]]), "A": torch.tensor([[-1.0, 0.0, 1.0]])}  # B is alone and has no deviation, A's is 1
    >>> fb.OneBit(rank=1, alpha=1).merged(p, torch.zeros(1, 3))
    tensor([[-1.3490, -1.3490,  1.3490]])
    """

    rank: int = 32
    alpha: float = 32.0
    bits: Literal[1, 2] = 1
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})
    kept: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    identity_at_birth: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (1, 2):
            raise Invalid(f"bits is {self.bits}; it can be 1 or 2")

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n)
        return complete({"A": A, "B": 0.001 * torch.randn(m, self.rank, generator=gen)}, start, "OneBit")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        L, R = self.lowrank(p)
        return base(x) + F.linear(F.linear(base.drop(x), R.to(x.dtype)), L.to(x.dtype))

    def lowrank(self, p: Params) -> tuple[Tensor, Tensor]:
        return self.s * coarse(p["B"], self.bits), coarse(p["A"], self.bits)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank)}

    def packed(self, p: Params) -> Params:
        """Codes of a factor in bytes, and its μ and σ: numbers that are off the mark by less than half a step of them give the same again."""
        out = Params()
        for k, w in p.items():
            code, _, mean, sigma = _seen(w.detach().float(), self.bits)
            held = {f"{k}_codes": pack(code.to(torch.uint8).view(1, -1), self.bits)[0], f"{k}_at": torch.stack([mean, sigma]).detach()}
            same = torch.equal(coarse(self._found(held, k, w.shape), self.bits), coarse(w, self.bits))
            out |= held if same else {k: w}  # of two bits, where hardly any are in the outer cells
        return out

    def unpacked(self, p: Params, m: int, n: int) -> Params:
        shapes = self.shapes(m, n)
        return {k: self._found(p, k, shapes[k]) if f"{k}_codes" in p else p[k] for k in shapes if k in p or f"{k}_codes" in p}

    def _found(self, p: Params, k: str, shape: Sequence[int]) -> Tensor:
        """Weights of these codes whose mean and deviation are μ and σ."""
        code = unpack(p[f"{k}_codes"][None], self.bits, math.prod(shape))
        c, (mean, sigma) = level_tensor(LEVELS[self.bits], code.device)[code.long()].double(), p[f"{k}_at"].double()
        spread = c.std() if c.numel() > 1 else c.new_zeros(())
        return (mean + torch.where(spread > 0, sigma / spread, 0.0) * (c - c.mean())).float().view(*shape)


def coarse(w: Tensor, bits: int) -> Tensor:
    """ŵ in float32, with the gradient of the paper.

    >>> coarse(torch.tensor([-2.0, -1.0, 1.0, 2.0]), 1)  # σ = 1.8257
    tensor([-1.2314, -1.2314,  1.2314,  1.2314])
    """
    code, v, mean, sigma = _seen(w.float(), bits)
    value = level_tensor(LEVELS[bits], w.device)[code]
    return (v + (value - v).detach()) * sigma + mean


def _seen(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, standardised weights, and μ and σ as they are computed with."""
    mean, sigma = w.mean(), w.std() if w.numel() > 1 else w.new_zeros(())
    v = (w - mean) / (sigma + 1e-5)
    levels = level_tensor(LEVELS[bits], w.device)
    code = torch.bucketize(v.detach(), (levels[1:] + levels[:-1]) / 2)
    with torch.no_grad():
        fraction, exponent = torch.frexp(sigma)
        rounded = torch.ldexp((fraction * STEPS).round() / STEPS, exponent)
        step = rounded / STEPS
        near = torch.where(step > 0, (mean / torch.where(step > 0, step, 1.0)).round() * step, mean)
    return code, v, mean + (near - mean).detach(), sigma + (rounded - sigma).detach()
