"""A weight in integer codes that learns itself, with its scales and zero points: rounding is passed straight through.

    w = l₀ + Δ₀ v,    Δ = Δ₀ e^θ,    l = l₀ + Δ₀ φ,  in formats with an integer zero point l = −Δ·⌊z₀ + φ⌉
    u = (w − l̂) / Δ̂,  q = clamp(⌊u⌉, Q_n, Q_p),    Ŵ = Δ̂·q + l̂

with Δ̂ and l̂ as the format's store gives them back. v is one number a weight, in steps of its grid; θ and φ are one each a block, φ where blocks
have a minimum or a zero point. With m = 1 where ⌊u⌉ is within the levels:

    ∂ŵ/∂w = m,    ∂ŵ/∂Δ = q − m u,    ∂ŵ/∂l = 1 − m

At first v is the weight that was quantized, moved into the cell of the code that it has, so that Ŵ is what the quantizer made, whichever it was.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits.formats.base import level_tensor
from finebits.formats.int import Int
from finebits.qtensor import QTensor
from finebits.refine._scales import MOST, clipped

REST = 0.25  # of a step: how far from its level a weight may start, lest the first steps undo what the quantizer chose


class LatentWeight:
    """An integer weight that can learn: `latent` is v, `tensors` are θ and φ. `q` is W as it was quantized."""

    def __init__(self, q: QTensor, W: Tensor) -> None:
        self.q, self.format = q, cast(Int, q.format)
        scales = self.format.scales(q.parts, q.shape[-1])
        self.scale = scales.scale.float()
        self.low = None if scales.shift is None else scales.shift.float()
        level = level_tensor(self.format.levels(), q.device).take(q.codes().long())
        w = W.float() if self.low is None else W.float() - self._spread(self.low)
        u = torch.where(self._spread(self.scale) != 0, w / self._spread(self.scale), level)
        self.latent = [nn.Parameter(torch.clamp(u, level - REST, level + REST))]
        self.start = self.latent[0].detach().clone()
        self.tensors = [nn.Parameter(torch.zeros_like(self.scale)) for _ in range(1 if self.low is None else 2)]

    def dense(self) -> Tensor:
        """The weight as it would be saved, with gradients of v, θ and φ."""
        return _Hardened.apply(*self._learned(), self.latent[0], self)

    def packed(self) -> QTensor:
        """The weight hardened to codes; as it was at first where nothing has moved."""
        if not any(p.any() for p in self.tensors) and torch.equal(self.latent[0], self.start):
            return self.q
        with torch.no_grad():
            return self.hardened(*self._learned(), self.latent[0])

    def hardened(self, scale: Tensor, low: Tensor | None, v: Tensor) -> QTensor:
        return clipped(scale, low, self.weight(v), self.q)

    def weight(self, v: Tensor) -> Tensor:
        """w."""
        w = v * self._spread(self.scale)
        return w if self.low is None else w + self._spread(self.low)

    def _learned(self) -> tuple[Tensor, Tensor | None]:
        scale = self.scale * self.tensors[0].clamp(-MOST, MOST).exp()
        if self.low is None:
            return scale, None
        if self.format.form == "integer":
            zero = torch.where(self.scale != 0, -self.low / self.scale, 0.0) + self.tensors[1]
            return scale, -scale * (zero + (zero.round() - zero).detach())
        return scale, self.low + self.scale * self.tensors[1]

    def _spread(self, per_block: Tensor) -> Tensor:
        return self.format.spread(per_block, self.q.shape[-1])


class _Hardened(torch.autograd.Function):
    """Scales, minima and v of a weight -> the weight as its codes would have it, dense. Packed parts and v alone are held for the way back."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, low: Tensor | None, v: Tensor, of: LatentWeight) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.held, ctx.v, ctx.of = of.hardened(scale, low, v), v, of
        return ctx.held.dequantize()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        q, of, format, n = ctx.held, ctx.of, ctx.held.format, ctx.held.shape[-1]
        scale, low, _ = format.scales(q.parts, n)
        each = format.spread(torch.where(scale == 0, 0.0, 1 / scale.float()), n)
        G, level, u = grads[0].float(), q.dequantize(torch.float32), of.weight(ctx.v)
        if low is not None:
            moved = format.spread(low.float(), n)
            level, u = level - moved, u - moved
        level, u = level * each, u * each
        levels = format.levels()
        inside = torch.where((u >= min(levels) - 0.5) & (u <= max(levels) + 0.5), G, 0.0)
        to_scale = format.cut(G * level - inside * u).sum(-1)
        to_low = None if low is None else format.cut(G - inside).sum(-1)
        return to_scale, to_low, inside * format.spread(of.scale, n), None
