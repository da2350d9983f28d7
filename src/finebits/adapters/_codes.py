"""Adapters whose weight is one in codes: what is multiplied with in training is what is served, to the bit, and nothing is rounded afterwards.

    y = x Ŵᵀ + b,    Ŵ = coded(p, W)                    ∂x = g Ŵ,    G = gᵀ x, which is made a few rows at a time and dropped

Ŵ is made again in the backward pass: what is kept of the tokens is x, or what an adapter needs of it. The rounding of a scale or a shift to
what it is held in counts as the identity.

`Rounded` holds what those have in common that round the merged weight. By block, with z = 2^(b−1) where it is not trained:

    V = W + s·B A,    u = V/Δ + z,    q = clamp(round(u), 0, 2^b − 1),    Ŵ = Δ (q − z),    mask = 1[0 ≤ u ≤ 2^b − 1]

    ∂V = G ∘ mask,    ∂B = s ∂V Aᵀ,    ∂A = s Bᵀ ∂V,    ∂log Δ = Σ G ∘ (Ŵ − mask ∘ V),    ∂z = −Δ Σ G ∘ (1 − mask)

They begin as their papers say, or with what a quantizer has found: Δ and z are its own, and W is moved until u is within ¼ of its code, so that
Ŵ is what the quantizer made, and the first steps do not undo what it chose.
"""

# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters._rows import some, tiles
from finebits.adapters.base import Base, Form, Layer, Params, check_scale, complete
from finebits.blocks import pack, unpack
from finebits.errors import Invalid
from finebits.formats.base import STORES, Format, Scales
from finebits.formats.int import Int
from finebits.qtensor import QTensor, times

REST = 0.25  # of a step: how far from the level that a quantizer chose a weight may begin


class Coded(Usual):
    """An adapter whose weight is in codes. Abstract."""

    form: ClassVar[Form] = "codes"
    drops: ClassVar[bool] = False

    @abstractmethod
    def coded(self, p: Params, W: Float[Tensor, "m n"]) -> QTensor:
        """What it is."""

    @abstractmethod
    def served(self, format: Format | None) -> Format:
        """The format of that, over a weight in this one."""

    @abstractmethod
    def gradients(self, p: Params, x: Tensor, g: Float[Tensor, "t m"], W: Tensor, made: Tensor) -> Params:
        """Those of all trained tensors, given what was kept of the inputs and what was multiplied with."""

    def keep(self, x: Float[Tensor, "t n"]) -> Tensor:
        """What backward needs of the inputs."""
        return x

    def made(self, p: Params, W: Float[Tensor, "m n"]) -> Tensor:
        """What is multiplied with. While a run is planned there are no values: a dense weight stands for the codes, as it does for others."""
        if not W.is_meta:
            return self.coded(p, W)
        if self.lays(W):
            self.coded(p, W)  # which takes memory
        return W

    def lays(self, W: Tensor) -> bool:
        """Can codes be made of W?"""
        return isinstance(W, QTensor)

    def under(self, base: Layer) -> Tensor:
        """The weight that it is made of. Raises ValueError where that is no weight alone, or in a format that it does not take."""
        W = base.weight
        if not isinstance(base, Base):
            raise Invalid(
                f"{type(self).__name__} makes codes of a weight, and another adapter lies over this one: lay it over the weight alone"
            )
        if not W.is_meta:
            self.served(W.format if isinstance(W, QTensor) else None)
        return W

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        W = base.weight
        y: Tensor = _Product.apply(x, self, W, tuple(p), *p.values())  # pyright: ignore[reportUnknownMemberType, reportAssignmentType]
        return y if base.bias is None else y + base.bias.to(y.dtype)

    @torch.no_grad()
    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return self.coded(p, W).dequantize()


class _Product(torch.autograd.Function):
    """x Ŵᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, adapter: Coded, W: Tensor, names: Sequence[str], *tensors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        with uncast(x):
            y = times(x, adapter.made(dict(zip(names, tensors, strict=True)), W))
        trained = any(ctx.needs_input_grad[4:])
        ctx.save_for_backward(adapter.keep(x.reshape(-1, x.shape[-1])) if trained else None, *tensors)
        ctx.rest = adapter, W, names
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, *tensors), (adapter, W, names) = ctx.saved_tensors, ctx.rest
        p = dict(zip(names, tensors, strict=True))
        with uncast(g):
            made = adapter.made(p, W)
            dx = times(g, made, True) if ctx.needs_input_grad[0] else None
            found = {} if x is None else adapter.gradients(p, x, g.reshape(-1, g.shape[-1]), W, made)
        return dx, None, None, None, *(found.get(k) for k in names)


def uncast(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, products have the dtype of their factors, whatever autocast says: codes must not depend on it.

    >>> with torch.autocast("cpu", torch.bfloat16), uncast(t := torch.ones(1, 1)):
    ...     print((t @ t).dtype)
    torch.float32
    """
    return contextlib.nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)


def wide(x: Tensor) -> torch.dtype:
    """What gradients of a few numbers are summed in: float32 at least.

    >>> wide(torch.ones(1, dtype=torch.bfloat16)), wide(torch.ones(1, dtype=torch.float64))
    (torch.float32, torch.float64)
    """
    return torch.promote_types(x.dtype, torch.float32)


def block_of(who: str, format: Format | None, block: int | str, what: str) -> Int:
    """The format of a base in integers of just these blocks, with plain scales; raises ValueError where it is none.

    >>> block_of("PEQA", fb.NF(4), 64, "scales")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: PEQA trains the scales of integers in blocks of 64 under plain scales, and this weight is NF(bits=4, block=64,
    scale='fp32', unit=None): quantize it as int of this block, or set the adapter's block
    """
    fits = isinstance(format, Int) and format.block == block and format.unit is None and isinstance(format.scale, str)
    if not fits:
        came = "dense" if format is None else str(format)
        raise Invalid(
            f"{who} trains the {what} of integers in blocks of {block} under plain scales, and this weight is {came}: quantize it as int of "
            "this block, or set the adapter's block"
        )
    return cast(Int, format)


def per_row(block: int | str, n: int) -> int:
    """Blocks in a row of n columns.

    >>> per_row(64, 100), per_row("row", 100)
    (2, 1)
    """
    return 1 if isinstance(block, str) else -(-n // block)


class Rounded(Coded):
    """Those that round the merged weight. Abstract."""

    rank: int
    bits: int
    block: int | str
    symmetric: bool
    scale: str
    kept: ClassVar[frozenset[str]] = frozenset({"A", "B", "log_scale", "zero"})

    def __post_init__(self) -> None:
        check_scale(self.rank, getattr(self, "alpha", 1.0))
        if self.grid.block == "tensor" or not isinstance(self.grid.scale, str):
            raise Invalid(f"{type(self).__name__} has plain scales ({', '.join(STORES)}), one a block or a row; got {self}")

    @property
    @abstractmethod
    def s(self) -> float:
        """The factor in front of the product."""

    @abstractmethod
    def begun(self, W: Float[Tensor, "r n"]) -> tuple[Tensor, Tensor]:
        """Scales, and zero points as codes, of some rows at birth."""

    @property
    def grid(self) -> Int:
        """What it rounds to."""
        return Int(self.bits, self.block, self.symmetric, self.scale, "full" if self.symmetric else "integer")

    @property
    def candidates(self) -> tuple[Format | None, ...]:
        return (None,)

    def served(self, format: Format | None) -> Format:
        if format is not None:
            raise Invalid(
                f"{type(self).__name__} rounds the weight that it trains to {self.bits} bits itself, from a dense one, and this is {format}: "
                "leave quantization.candidates out"
            )
        return self.grid

    def lays(self, W: Tensor) -> bool:
        return not isinstance(W, QTensor)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        each = m, per_row(self.block, n)
        return {"A": (self.rank, n), "B": (m, self.rank), "log_scale": each} | ({} if self.symmetric else {"zero": each})

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        W = self.under(base)
        m, n = W.shape
        parts = [self.begun(some(W, rows, torch.float32)) for rows in tiles(m, n)]
        scale, zero = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        own = {
            "A": (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n),
            "B": torch.zeros(m, self.rank),
            "log_scale": torch.where(scale > 0, scale, 1.0).log(),  # a block of zeros is coded as such at any scale
        }
        return complete(own | ({} if self.symmetric else {"zero": zero}), start, type(self).__name__)

    def born(self, W: Float[Tensor, "m n"], q: QTensor) -> tuple[Float[Tensor, "m n"], Params]:
        """The weight, moved as little as need be, and the tensors with which it is q."""
        format, (m, n), top = self.grid, W.shape, 2**self.bits - 1
        edge = 2.0 ** (self.bits - 9) + 2.0**-10  # what rounding W to bfloat16 moves u by, and more
        near, moved = min(REST, 0.5 - edge), torch.empty_like(W)
        scale = q.parts["scale"].float()
        zero = q.parts["zero"].float() if "zero" in q.parts else torch.full_like(scale, 2.0 ** (self.bits - 1))
        for rows in tiles(m, n):
            step, z = format.spread(scale[rows], n), format.spread(zero[rows], n)
            codes = unpack(q.parts["codes"][rows], self.bits, n).float()
            u = torch.where(step != 0, W[rows] / step + z, z)
            v = u.clamp(codes - near, codes + near).clamp(edge, top - edge)  # beyond the last level a weight has no gradient
            moved[rows] = torch.where(u == v, W[rows], (v - z) * step)
        start = {"log_scale": torch.where(scale > 0, scale, 1.0).log()}
        return moved, start | ({} if self.symmetric else {"zero": zero})

    def coded(self, p: Params, W: Float[Tensor, "m n"]) -> QTensor:
        format, (m, n) = self.grid, W.shape
        parts = {"scale": p["log_scale"].exp().to(STORES[self.scale])}
        if not self.symmetric:
            parts["zero"] = p["zero"].round().clamp(0, format.top).to(torch.uint8)
        scale, shift, _ = format.scales(parts, n)
        codes = [
            pack(format.encode(self._sum(p, W, rows), Scales(scale[rows], None if shift is None else shift[rows])), self.bits)
            for rows in tiles(m, n)
        ]
        return QTensor({"codes": torch.cat(codes), **parts}, format, (m, n), W.dtype)

    def gradients(self, p: Params, x: Tensor, g: Float[Tensor, "t m"], W: Tensor, made: Tensor) -> Params:
        format, (m, n), dtype = self.grid, W.shape, wide(x)
        found = {k: torch.zeros(t.shape, dtype=dtype, device=t.device) for k, t in p.items()}
        A, B = p["A"].to(dtype), p["B"].to(dtype)
        by_block = lambda t: format.cut(t).sum(-1)  # noqa: E731
        scale = p["log_scale"].exp().to(STORES[self.scale]).to(dtype)
        zero = torch.full_like(scale, 2.0 ** (self.bits - 1)) if self.symmetric else p["zero"].round().clamp(0, format.top).to(dtype)
        for rows in tiles(m, n):
            G = g[:, rows].to(dtype).mT @ x.to(dtype)
            V, step, z = self._sum(p, W, rows, dtype), format.spread(scale[rows], n), format.spread(zero[rows], n)
            u = V / step + z
            dV = torch.where(u.clamp(0, 2**self.bits - 1) == u, G, 0.0)
            hard = some(made, rows, dtype) if isinstance(made, QTensor) else V
            found["log_scale"][rows] = by_block(G * hard - dV * V)
            if not self.symmetric:
                found["zero"][rows] = by_block(dV - G) * scale[rows]
            found["B"][rows] = self.s * dV @ A.mT
            found["A"] += self.s * B[rows].mT @ dV
        return {k: t.to(p[k].dtype) for k, t in found.items()}

    def _sum(self, p: Params, W: Tensor, rows: slice, dtype: torch.dtype = torch.float32) -> Float[Tensor, "r n"]:
        """Rows of V, in float32 as they are rounded unless more is asked for."""
        with uncast(p["A"]):
            return some(W, rows, torch.float32).addmm(p["B"][rows].float(), p["A"].float(), alpha=self.s).to(dtype)
