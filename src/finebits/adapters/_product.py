"""Base and low-rank update in one step of autograd: x Wᵀ + b + (x Aᵀ) Bᵀ, where a step for every product would cost more than short products.

y = x Wᵀ + b + h Bᵀ      h = s·z Aᵀ                          z is x, or what dropout left of it
∂x = g W + ∂h A          ∂h = s·g B
∂A = ∂hᵀ z               ∂B = gᵀ h

What backward needs of the tokens is z, unless A is frozen, and h, unless B is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finebits.adapters.base import Base, Layer
from finebits.dispatch import plain
from finebits.qtensor import times


def product(x: Tensor, A: Tensor, B: Tensor, s: float, base: Layer) -> Tensor:
    """base(x) + s·z Aᵀ Bᵀ, in one step where autograd alone looks on."""
    z = base.drop(x)
    if isinstance(base, Base) and base.frozen and x.dtype == A.dtype == B.dtype and plain(x):
        return LowRankProduct.apply(x, None if z is x else z, A, B, base.weight, base.bias, s)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return base(x) + F.linear(F.linear(z, A), s * B)


class LowRankProduct(torch.autograd.Function):
    """W and b are frozen; A, B and x have one dtype. `z` is None where it is x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, A: Tensor, B: Tensor, W: Tensor, bias: Tensor | None, s: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = times(x, W)
        if bias is not None:
            y += bias.to(y.dtype)
        flat = (x if z is None else z).reshape(-1, x.shape[-1])
        h = torch.mm(flat, A.mT)
        if s != 1:
            h *= s
        y.view(-1, y.shape[-1]).addmm_(h, B.mT)
        to_A, to_B = ctx.needs_input_grad[2:4]
        ctx.save_for_backward(flat if to_A else None, h if to_B else None, A, B)
        ctx.rest = W, s, z is None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        flat, h, A, B = ctx.saved_tensors
        W, s, same = ctx.rest
        to_x, to_z, to_A, to_B = ctx.needs_input_grad[:4]
        g = grads[0]
        dx = times(g, W, True) if to_x else None
        dz = dA = dB = None
        rows = g.reshape(-1, g.shape[-1])
        if to_x and same or to_z or to_A:
            dh = torch.mm(rows, B)
            if s != 1:
                dh *= s
            if dx is not None and same:
                dx.view(-1, dx.shape[-1]).addmm_(dh, A)
            elif to_z:
                dz = torch.mm(dh, A).view(*g.shape[:-1], A.shape[-1])
            dA = torch.mm(dh.mT, flat) if to_A else None
        if to_B:
            dB = torch.mm(rows.mT, h)
        return dx, dz, dA, dB, None, None, None
