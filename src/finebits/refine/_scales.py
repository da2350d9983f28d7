"""Scales of a quantized weight that learn: while its codes stay, or with the thresholds that it is clipped at and its codes after them.

`ScaledWeight`:

    Ŵ = Δ̂·level(q) + l̂,    Δ = Δ₀ e^θ,    l = l₀ + Δ₀ φ

with θ and φ, one each a block, zero at first; φ where the format holds a shift of its own. Δ̂ and l̂ are Δ and l as the format's store gives
them back, so what learns sees what will be saved; gradients pass the store as if it were exact:

    ∂L/∂Δ = Σ_block ∂L/∂ŵ · level(q),    ∂L/∂l = Σ_block ∂L/∂ŵ

`ClippedWeight` (W the weight that is rounded to nearest, its blocks in [l₀, h₀], in formats without a shift in ±h₀):

    h = h₀ σ(γ)/σ(4),  l = l₀ σ(β)/σ(4),    Δ = (h − l) / span,    Ŵ = Δ̂·level(q) + l̂,    q nearest to u = (W − l̂) / Δ̂

with γ and β 4 at first, so that Ŵ is what it was, and rounding straight through (LSQ): where u is within the levels ∂ŵ/∂Δ = level(q) − u
and ∂ŵ/∂l = 0, elsewhere level(q) and 1. An integer zero point is found anew from l and Δ, and has no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from finebits.formats.base import Format, Scales
from finebits.qtensor import QTensor

MOST = math.log(4)  # of |θ|: no store overflows where a learning rate is far too high
START = 4.0  # of γ and β, as in the authors' code
LEAST = 1e-3  # of a clipped scale, as a share of the ideal one: thresholds may cross


class ScaledWeight:
    """A quantized weight whose scales can learn: `tensors` are θ and φ."""

    def __init__(self, q: QTensor) -> None:
        self.q = q
        scales = q.format.scales(q.parts, q.shape[-1])
        self.scale = scales.scale.float()
        self.shift = scales.shift.float() if "shift" in q.parts and scales.shift is not None else None
        self.tensors = [nn.Parameter(torch.zeros_like(self.scale)) for _ in range(1 if self.shift is None else 2)]

    def dense(self) -> Tensor:
        """The weight as it would be saved, with gradients of θ and φ."""
        return _Decoded.apply(*self._learned(), self.q)

    def packed(self) -> QTensor:
        """The weight with its new scales; the very same one where nothing has moved."""
        if not any(p.any() for p in self.tensors):
            return self.q
        with torch.no_grad():
            return _stored(*self._learned(), self.q)

    def _learned(self) -> tuple[Tensor, Tensor | None]:
        grown = self.scale * self.tensors[0].clamp(-MOST, MOST).exp()
        return grown, None if self.shift is None else self.shift + self.scale * self.tensors[1]


def _stored(scale: Tensor, shift: Tensor | None, q: QTensor) -> QTensor:
    return QTensor(q.format.rescaled(q.parts, scale, shift), q.format, q.shape, q.dtype)


class ClippedWeight:
    """A weight that is rounded to nearest, under clipping that can learn: `tensors` are γ and β. `q` is W as it was rounded."""

    def __init__(self, q: QTensor, W: Tensor) -> None:
        self.q, self.W = q, W
        self.ideal = q.format.ideal(W.float())
        self.tensors = [nn.Parameter(torch.full_like(self.ideal.scale, START)) for _ in range(1 if self.ideal.shift is None else 2)]

    def dense(self) -> Tensor:
        """The weight as it would be saved, with gradients of γ and β."""
        return _Rounded.apply(*self._learned(), self.W, self.q)

    def packed(self) -> QTensor:
        """The weight as it is clipped now; as it was at first where nothing has moved."""
        if all(bool((p == START).all()) for p in self.tensors):
            return self.q
        with torch.no_grad():
            return clipped(*self._learned(), self.W, self.q)

    def _learned(self) -> tuple[Tensor, Tensor | None]:
        scale, low, _ = self.ideal
        if low is None:
            return scale * _open(self.tensors[0]), None
        span = self.q.format.peak
        low, high = _open(self.tensors[1]) * low, _open(self.tensors[0]) * (low + scale * span)
        return torch.maximum((high - low) / span, LEAST * scale), low


def _open(logit: Tensor) -> Tensor:
    return torch.sigmoid(logit) * (1 + math.exp(-START))


def clips(format: Format) -> bool:
    """Are a format's blocks scaled by their extremes, which can be clipped?"""
    return format.plain or getattr(format, "form", "") == "integer"


def clipped(scale: Tensor, shift: Tensor | None, W: Tensor, q: QTensor) -> QTensor:
    parts = q.format.hold(Scales(scale, shift), W)
    codes = q.format.packed(W, q.format.scales(parts, W.shape[-1]))
    return QTensor({"codes": codes, **parts}, q.format, q.shape, q.dtype)


class _Rounded(torch.autograd.Function):
    """Scales and shifts of a weight's blocks -> the weight rounded to nearest under them, dense."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, shift: Tensor | None, W: Tensor, q: QTensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.held, ctx.W = clipped(scale, shift, W, q), W
        return ctx.held.dequantize()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        q, format, n = ctx.held, ctx.held.format, ctx.held.shape[-1]
        scale, shift, _ = format.scales(q.parts, n)
        each = format.spread(torch.where(scale == 0, 0.0, 1 / scale.float()), n)
        G, D, u = grads[0].float(), q.dequantize(torch.float32), ctx.W.float()
        if shift is not None:
            moved = format.spread(shift.float(), n)
            D, u = D - moved, u - moved
        level, u = D * each, u * each
        levels = format.levels()
        within = (u >= min(levels)) & (u <= max(levels))
        to_scale = format.cut(G * (level - torch.where(within, u, 0.0))).sum(-1)
        if shift is None:
            return to_scale, None, None, None
        if "zero" in q.parts:  # the shift is −Δ·z: what it moves, Δ moves where the weight is clipped
            return to_scale + format.cut(torch.where(within, 0.0, G)).sum(-1) * _per_scale(shift, scale), None, None, None
        return to_scale, format.cut(torch.where(within, 0.0, G)).sum(-1), None, None


def _per_scale(shift: Tensor, scale: Tensor) -> Tensor:
    """−z."""
    return torch.where(scale == 0, 0.0, shift.float() / scale.float())


class _Decoded(torch.autograd.Function):
    """Scales and shifts of a weight's blocks -> the dense weight. Packed parts alone are saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, shift: Tensor | None, q: QTensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.held = _stored(scale, shift, q)
        return ctx.held.dequantize()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        q, format, n = ctx.held, ctx.held.format, ctx.held.shape[-1]
        scale, shift, _ = format.scales(q.parts, n)
        scale, G, level = scale.float(), grads[0].float(), q.dequantize(torch.float32)
        moved = "shift" in q.parts
        if moved:
            level -= format.spread(shift.float(), n)
        level *= format.spread(torch.where(scale == 0, 0.0, 1 / scale), n)
        return format.cut(level.mul_(G)).sum(-1), format.cut(G).sum(-1) if moved else None, None
