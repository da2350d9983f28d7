"""dequantize and linear: shapes, experts, gradients, and which way a product goes."""

from __future__ import annotations

import functools
import math
from ctypes import byref

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.kernels import reference
from finebits.kernels.cpu import binding
from finebits.kernels.cpu.binding import DTYPES, LEVELS, library
from finebits.kernels.cpu.buffers import empty, scratch
from finebits.kernels.cpu.rows import PackedRows, decode, rows_of
from finebits.kernels.table import Table

PANEL_BYTES = 32 << 20
TOKENS = 1024  # whose activations are widened at a time


def dequantize(t: Table, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Bit-exactly reference.dequantize; into `out` if given, which saves the page faults of a new tensor."""
    shape = (*t.codes.shape[:-1], t.n)
    if out is not None and (out.shape != shape or out.dtype != dtype or not out.is_contiguous()):
        raise Invalid(f"out must be contiguous {shape} {dtype}, not {tuple(out.shape)} {out.dtype}")
    if dtype not in DTYPES or math.prod(shape) == 0 or _differentiable(t):
        W = reference.dequantize(t, dtype)
        return W if out is None else out.copy_(W)
    if out is None:
        out = empty(shape, dtype)
    decode(rows_of(t), out, 0, t.n)
    return out


def linear(x: Tensor, t: Table, transposed: bool = False) -> Tensor:
    """x @ Wᵀ, or x @ W if `transposed`, differentiable in x. Experts (*e, m, n) take part as in torch.matmul."""
    if x.dtype not in DTYPES or not x.is_cpu or _differentiable(t):
        return reference.linear(x, t, transposed)
    if x.requires_grad and torch.is_grad_enabled():
        return _Product.apply(x, t, transposed)
    rows, shape = rows_of(t), x.shape
    *experts, m = rows.lead
    inputs, outputs = (m, t.n) if transposed else (t.n, m)
    if not shape or shape[-1] != inputs:
        raise Invalid(f"x must end in {inputs} columns for a weight {(*rows.lead, t.n)}, transposed={transposed}; it is {tuple(shape)}")
    if not experts:
        y = empty((*shape[:-1], outputs), x.dtype)
        _product(x, rows, y, transposed)
        return y
    single = x.ndim == 1
    x = x[None] if single else x
    batch = torch.broadcast_shapes(x.shape[:-2], experts)
    y = torch.empty(*batch, x.shape[-2], outputs, dtype=x.dtype)
    number = torch.arange(math.prod(experts)).view(experts).expand(batch).flatten().tolist()
    xs = x.expand(*batch, *x.shape[-2:])
    ys = y.view(-1, *y.shape[-2:])
    for i, (e, at) in enumerate(zip(number, torch.cartesian_prod(*map(torch.arange, batch)).view(-1, len(batch)).tolist())):
        _product(xs[tuple(at)], rows.expert(e, m), ys[i], transposed)
    return y[..., 0, :] if single else y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, t: Table, transposed: bool) -> Tensor:
        ctx.t, ctx.transposed, ctx.shape = t, transposed, x.shape
        return linear(x, t, transposed)

    @staticmethod
    def backward(ctx, grad: Tensor):
        single = len(ctx.shape) == 1 and ctx.t.codes.ndim > 2
        g = linear(grad[..., None, :] if single else grad, ctx.t, not ctx.transposed)
        return (g[..., 0, :] if single else g).sum_to_size(ctx.shape), None, None


def _product(x: Tensor, rows: PackedRows, y: Tensor, transposed: bool) -> None:
    """y (*tokens, outputs), contiguous, from x (*tokens, inputs)."""
    s = rows.struct
    inputs, outputs = (s.rows, s.n) if transposed else (s.n, s.rows)
    if y.numel() == 0 or inputs == 0:
        y.zero_()
    elif (tokens := y.numel() // outputs) <= most_tokens(x.dtype):
        x = x.contiguous()
        sizes = tokens, DTYPES[x.dtype], transposed, binding.level(), torch.get_num_threads()
        if library().finebits_product(byref(s), x.data_ptr(), y.data_ptr(), *sizes):
            raise MemoryError("finebits linear: no memory for the working buffers")
    else:
        _by_panels(x.reshape(-1, inputs), rows, y.view(-1, outputs), transposed)


def most_tokens(dtype: torch.dtype) -> float:
    """The largest number of tokens for which the library's own product is faster than decoding panels for torch's (measured)."""
    return _most_at(binding.level(), dtype)


@functools.cache
def _most_at(level: int, dtype: torch.dtype) -> float:
    if LEVELS[level] == "scalar":
        return 4
    return 64 if dtype == torch.bfloat16 and LEVELS[level] == "avx512" and library().finebits_matrix_unit() else math.inf


def _by_panels(x: Tensor, rows: PackedRows, y: Tensor, transposed: bool) -> None:
    """Products of float32, whatever x is: torch's of 16 bits take several times as long, where no matrix unit does them."""
    # Panels cut the outputs, never the sum: its partial results would be rounded to y.dtype.
    s = rows.struct
    dtype = x.dtype if library().finebits_matrix_unit() and x.dtype == torch.bfloat16 else torch.float32
    inner, outputs, unit = (s.rows, s.n, 64) if transposed else (s.n, s.rows, 32)
    step = min(outputs, max(8, PANEL_BYTES // (inner * dtype.itemsize) // unit * unit))
    tokens = min(len(x), TOKENS) if x.dtype != dtype else len(x)
    with scratch((step * inner + (0 if x.dtype == dtype else tokens * (inner + step))), dtype) as buffer:
        for a in range(0, outputs, step):
            b = min(a + step, outputs)
            panel = buffer[: (b - a) * inner].view((s.rows, b - a) if transposed else (b - a, s.n))
            if transposed:
                decode(rows, panel, a, b)
            else:
                decode(rows, panel, 0, s.n, a, b)
            W = panel if transposed else panel.mT
            if x.dtype == dtype and b - a == outputs:
                torch.mm(x, W, out=y)
            elif x.dtype == dtype:
                y[:, a:b] = x @ W
            else:
                for part, to in zip(x.split(tokens), y.split(tokens)):
                    x_wide, y_wide = buffer[step * inner :][: len(part) * (inner + b - a)].split([len(part) * inner, len(part) * (b - a)])
                    x_wide, y_wide = x_wide.view(len(part), inner).copy_(part), y_wide.view(len(part), b - a)
                    to[:, a:b] = torch.mm(x_wide, W, out=y_wide)


def _differentiable(t: Table) -> bool:
    return torch.is_grad_enabled() and (t.scale.requires_grad or t.levels.requires_grad or t.shift is not None and t.shift.requires_grad)
