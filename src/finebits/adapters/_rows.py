"""Weights a few rows at a time: for adapters that need of a base, or of their update, what only its dense form has, and shall not hold it whole.

`made(z, m, make, *p)` is z ΔWᵀ with ΔW made of p tile by tile, in the forward pass and again in the backward pass:

    y = z ΔWᵀ,    ∂z = g ΔW,    ∂p = ⟨∂ΔW/∂p, gᵀ z⟩
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finebits.adapters.base import Base, Layer
from finebits.dispatch import plain
from finebits.formats.base import SLAB
from finebits.qtensor import QTensor, dense

Make = Callable[..., Tensor]  # (rows, *p) -> these rows of a matrix, in the dtype of p


def tiles(m: int, n: int, whole: int = 1) -> Iterator[slice]:
    """Slices that cut m rows of n into tiles of at most SLAB numbers, each but the last a multiple of `whole` rows.

    >>> list(tiles(10, 2**18, whole=3))
    [slice(0, 3, None), slice(3, 6, None), slice(6, 9, None), slice(9, 10, None)]
    """
    step = max(1, SLAB // max(n, 1) // whole) * whole
    return (slice(a, min(a + step, m)) for a in range(0, m, step))


def some(W: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of a weight, dense.

    >>> some(fb.quantize(torch.tensor([[7.0, 1.2], [0.0, 7.0]]), fb.Int(4)), slice(0, 1), torch.float32)
    tensor([[7., 1.]])
    """
    if torch.compiler.is_compiling() and isinstance(W, QTensor):  # a graph has packed weights in products alone
        return F.linear(torch.eye(W.shape[-1], dtype=dtype, device=W.device), W).mT[rows]
    return dense(W.apply_parts(lambda part: part[rows], dim=0) if isinstance(W, QTensor) else W[rows], dtype)


def made(z: Tensor, m: int, make: Make, *p: Tensor, whole: int = 1) -> Tensor:
    """z ΔWᵀ for the (m, n) matrix whose rows `make` gives; under compilers and transforms ΔW is made whole.

    >>> B, A = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 1.0]])
    >>> made(torch.tensor([[1.0, 2.0]]), 2, lambda rows, B, A: B[rows] @ A, B, A)
    tensor([[3., 6.]])
    """
    if plain(z):
        return _Made.apply(z, m, make, whole, *p)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return z @ make(slice(0, m), *p).mT


def tiled(base: Layer) -> bool:
    """Can rows of the base be had without the rest, none of them trained?"""
    return isinstance(base, Base) and base.frozen


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, m: int, make: Make, whole: int, *p: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = z.new_empty(*z.shape[:-1], m)
        for rows in tiles(m, z.shape[-1], whole):
            y[..., rows] = z @ make(rows, *p).mT
        ctx.save_for_backward(z, *p)
        ctx.rest = m, make, whole
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (z, *p), (m, make, whole) = ctx.saved_tensors, ctx.rest
        trained = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        dz = torch.zeros_like(z) if ctx.needs_input_grad[0] else None
        dp = {i: torch.zeros_like(p[i]) for i in trained}
        flat_z, flat_g = z.reshape(-1, z.shape[-1]), g.reshape(-1, m)
        for rows in tiles(m, z.shape[-1], whole):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(p)]
                part = make(rows, *leaves)
            if dz is not None:
                dz += g[..., rows] @ part.detach()
            if trained:
                got = torch.autograd.grad(part, [leaves[i] for i in trained], flat_g[:, rows].mT @ flat_z)
                for i, more in zip(trained, got, strict=True):
                    dp[i] += more
        return dz, None, None, None, *(dp.get(i) for i in range(len(p)))
