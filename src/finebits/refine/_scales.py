"""Scales of a quantized weight that learn while its codes stay.

    Ŵ = Δ̂·level(q) + l̂,    Δ = Δ₀ e^θ,    l = l₀ + Δ₀ φ

with θ and φ, one each a block, zero at first; φ where the format holds a shift of its own. Δ̂ and l̂ are Δ and l as the format's store gives
them back, so what learns sees what will be saved; gradients pass the store as if it were exact:

    ∂L/∂Δ = Σ_block ∂L/∂ŵ · level(q),    ∂L/∂l = Σ_block ∂L/∂ŵ
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from finebits.qtensor import QTensor

MOST = math.log(4)  # of |θ|: no store overflows where a learning rate is far too high


class Scaled:
    """A quantized weight whose scales can learn: `tensors` are θ and φ."""

    def __init__(self, q: QTensor) -> None:
        self.q = q
        held = q.format.scales(q.parts, q.shape[-1])
        self.scale = held.scale.float()
        self.shift = held.shift.float() if "shift" in q.parts and held.shift is not None else None
        self.tensors = [nn.Parameter(torch.zeros_like(self.scale)) for _ in range(1 if self.shift is None else 2)]

    def dense(self) -> Tensor:
        """The weight as it would be saved, with gradients of θ and φ."""
        return _Decoded.apply(*self._learned(), self.q)  # type: ignore[no-any-return]

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
