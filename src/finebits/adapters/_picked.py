"""Some columns, or some rows, of a weight with numbers added to them, wherever they lie: nothing is permuted, and no weight is copied.

columns:   y = x Wᵀ + b + s·z Vᵀ,   z = x[:, at]        ∂V = s·gᵀ z          of the tokens z is kept
rows:      y = x Wᵀ + b,   y[:, at] += x Uᵀ             ∂U = g[:, at]ᵀ x     of the tokens x is kept
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Base, Layer, Rescaled
from finebits.dispatch import plain
from finebits.qtensor import times


def columns(x: Float[Tensor, "*t n"], V: Float[Tensor, "m s"], at: Tensor, base: Layer, s: float = 1.0) -> Float[Tensor, "*t m"]:
    """base(x) + s·z Vᵀ, in one step where autograd alone looks on.

    >>> columns(torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0]]), torch.tensor([1]), Base(torch.ones(1, 2)))
    tensor([[16.]])
    """
    few = x.index_select(-1, at)
    z = base.drop(few)  # dropout goes number by number: no need to drop what is not read
    if z is few and isinstance(base, Base) and base.frozen and x.dtype == V.dtype and plain(x):
        return ColumnProduct.apply(x, V, at, base.weight, base.bias, s)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return base(x) + F.linear(z, s * V)


def rows(x: Float[Tensor, "*t n"], U: Float[Tensor, "s n"], at: Tensor, base: Layer) -> Float[Tensor, "*t m"]:
    """base(x), with x Uᵀ added at some outputs.

    >>> rows(torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([1]), Base(torch.ones(2, 2)))
    tensor([[6., 8.]])
    """
    z = base.drop(x)
    if z is x and isinstance(base, Base) and base.frozen and x.dtype == U.dtype and plain(x):
        return RowProduct.apply(x, U, at, base.weight, base.bias)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return base(x).index_add(-1, at, F.linear(z, U))


def moved(W: Float[Tensor, "m n"], V: Tensor, at: Tensor, part: Literal["columns", "rows"]) -> Float[Tensor, "m n"]:
    """The weight with V added: what is not picked stays, to the bit.

    >>> moved(torch.ones(2, 2), torch.tensor([[2.0], [3.0]]), torch.tensor([1]), "columns")
    tensor([[1., 3.],
            [1., 4.]])
    """
    return W.index_add(1 if part == "columns" else 0, at, V)


def product(V: Tensor, at: Tensor, W: Float[Tensor, "m n"], part: Literal["columns", "rows"]) -> Rescaled:
    """The same as a product of rank s, one factor of which is one-hot.

    >>> parts = product(torch.tensor([[2.0], [3.0]]), torch.tensor([1]), torch.ones(2, 2), "columns")
    >>> parts.L, parts.R
    (tensor([[2.],
            [3.]]), tensor([[0., 1.]]))
    """
    hot = F.one_hot(at, W.shape[part == "columns"]).to(V.dtype)
    return Rescaled(None, None, V, hot) if part == "columns" else Rescaled(None, None, hot.mT, V)


class ColumnProduct(torch.autograd.Function):
    """x Wᵀ + b + s·z Vᵀ with z = x[:, at], of which alone the tokens are kept; ∂x = g W, and s·g V is added to its columns where they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, V: Tensor, at: Tensor, W: Tensor, bias: Tensor | None, s: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = times(x, W)
        if bias is not None:
            y += bias.to(y.dtype)
        z = x.index_select(-1, at).reshape(-1, len(at))
        y.view(-1, y.shape[-1]).addmm_(z, V.mT, alpha=s)
        ctx.save_for_backward(z, V, at)
        ctx.rest = W, s
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        z, V, at = ctx.saved_tensors
        W, s = ctx.rest
        g, dx = grads[0].reshape(-1, len(V)), None
        if ctx.needs_input_grad[0]:
            dx = times(grads[0], W, True)
            dx.view(-1, dx.shape[-1]).index_add_(1, at, g @ V, alpha=s)
        return dx, s * (g.mT @ z), None, None, None, None


class RowProduct(torch.autograd.Function):
    """x Wᵀ + b with x Uᵀ added at some outputs, which are not kept; ∂x = g W + g[:, at] U."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, at: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = times(x, W)
        if bias is not None:
            y += bias.to(y.dtype)
        ctx.save_for_backward(x, U, at)
        ctx.rest = W
        return y.index_add_(-1, at, F.linear(x, U))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, U, at = ctx.saved_tensors
        few, dx = grads[0].index_select(-1, at).reshape(-1, len(U)), None
        if ctx.needs_input_grad[0]:
            dx = times(grads[0], ctx.rest, True)
            dx.view(-1, dx.shape[-1]).addmm_(few, U)
        return dx, few.mT @ x.reshape(-1, x.shape[-1]), None, None, None
