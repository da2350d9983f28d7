"""How the scales of a format are held: small values, each a pair put (scales -> parts) and get (parts -> the scales that decoding uses).

    fp32 | fp16 | bf16     as they are
    Pow2                   2^e, one byte of exponent     ZeroQuant-FP, Wu et al., arXiv:2307.09782v2, constraints M1 and M2
    E4M3                   eight-bit floats under one float32 of the tensor
    Double                 codes under a second level of scales     QLoRA, arXiv:2305.14314v1, section 3; LQ-LoRA, arXiv:2311.12023v4
    Clustered              K distinct values and an index

Scales are (*e, m, k): one a block, k blocks a row, and groups of scales stay inside a row. A part whose name is in `shared` belongs to a
whole matrix, is held once and leads with *e; every other part leads with (*e, m). `get` is float32 arithmetic in the order written.

Codes of less than eight bits are packed row by row and do not say how many they are: `get` without k may return more columns than there
are blocks, and the surplus means nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from finebits.blocks import cut, join, n_blocks, pack, row_bytes, unpack
from finebits.errors import Invalid
from finebits.kernels.reference import STORES

Parts = dict[str, Tensor]
Loss = Callable[[Tensor], Tensor]  # candidate scales (*e, m, k) -> squared error of every block coded with them (*e, m, k)


@runtime_checkable
class Store(Protocol):
    """How scales are held. A frozen dataclass of settings."""

    @property
    def shared(self) -> frozenset[str]:
        """Names of the parts that belong to a whole matrix."""
        ...

    @property
    def alone(self) -> str | None:
        """What a scale is rounded to without a look at other scales, as the kernels name it; None where others matter or no kernel knows it."""
        ...

    def put(self, scale: Float[Tensor, "*e m k"], loss: Loss) -> Parts:
        """Scales -> parts; the part that has a column a block is named "scale". Raises ValueError where a scale does not fit."""
        ...

    def get(self, parts: Parts, k: int | None = None) -> Tensor:
        """Parts -> the scales that decoding uses (*e, m, k), float32 or a dtype that float32 holds exactly."""
        ...

    def row_bits(self, k: int) -> int:
        """Bits that the k scales of one row take."""
        ...

    def tensor_bits(self) -> int:
        """Bits held once for a whole matrix."""
        ...


def stored(scale: Tensor, store: str) -> Tensor:
    """Scales rounded to a plain store; raises if one does not fit."""
    out = scale.to(STORES[store])
    if not torch.isfinite(out).all():
        raise Invalid(f"a block's scale does not fit {store}: choose a wider scale store, or look for Inf and NaN in the weight")
    return out


def width(store: str) -> int:
    """Bits of one scale in a plain store."""
    return STORES[store].itemsize * 8


@dataclass(frozen=True)
class Plain:
    """A float a block. Written in a format as its dtype alone, "fp32", "fp16" or "bf16"."""

    dtype: str = "fp32"

    @property
    def shared(self) -> frozenset[str]:
        return frozenset()

    @property
    def alone(self) -> str:
        return self.dtype

    def put(self, scale: Float[Tensor, "*e m k"], loss: Loss) -> Parts:
        return {"scale": stored(scale, self.dtype)}

    def get(self, parts: Parts, k: int | None = None) -> Tensor:
        return parts["scale"]

    def row_bits(self, k: int) -> int:
        return k * width(self.dtype)

    def tensor_bits(self) -> int:
        return 0


@dataclass(frozen=True)
class Pow2:
    """Powers of two, an exponent of one byte a block.

    M1 (`over` "block"):             Δ̂ = 2^r(log2 Δ), the byte is the exponent + 127 as in the OCP MX scale E8M0
    M2 (`over` "row" or "tensor"):   Δ̂ = Δmax / 2^r(log2(Δmax / Δ)), Δmax the largest of the row or the tensor, held in float32

    r is `rounding`: floor, ceil, nearest, or mse, which takes for every block whichever of floor and ceil codes it with less squared error.
    Note that ceil widens a scale under M1 and narrows it (and clips the block's maximum) under M2. A zero scale becomes the smallest
    there is.
    """

    rounding: Literal["floor", "nearest", "ceil", "mse"] = "mse"
    over: Literal["block", "row", "tensor"] = "block"

    def __post_init__(self) -> None:
        _one_of("rounding", self.rounding, ("floor", "nearest", "ceil", "mse"))
        _one_of("over", self.over, ("block", "row", "tensor"))

    @property
    def shared(self) -> frozenset[str]:
        return frozenset({"scale_top"} if self.over == "tensor" else ())

    @property
    def alone(self) -> None:
        return None

    def put(self, scale: Float[Tensor, "*e m k"], loss: Loss) -> Parts:
        scale = stored(scale.float(), "fp32")
        if self.over == "block":
            return {"scale": self._exponent(scale, loss, lambda e: (e.clamp(-127, 127) + 127).byte(), {})}
        top = _over(scale, self.over)
        ratio = torch.where(scale > 0, (top.unsqueeze(-2) if self.over == "tensor" else top) / scale, torch.inf)
        parts = {"scale_top": top}
        return {"scale": self._exponent(ratio, loss, lambda e: e.clamp(0, 126).byte(), parts), **parts}

    def _exponent(self, x: Tensor, loss: Loss, byte: Callable[[Tensor], Tensor], parts: Parts) -> UInt8[Tensor, "*e m k"]:
        mantissa, e = torch.frexp(x)  # x = mantissa · 2^e, mantissa in [1/2, 1)
        e = torch.where(x > 0, e, -1000)
        e = torch.where(torch.isinf(x), 1000, e)
        floor, ceil = byte(e - 1), byte(torch.where(mantissa == 0.5, e - 1, e))
        if self.rounding == "floor":
            return floor
        if self.rounding == "ceil":
            return ceil
        if self.rounding == "nearest":
            return torch.where(mantissa < math.sqrt(0.5), floor, ceil)
        better = loss(self.get({"scale": floor, **parts})) < loss(self.get({"scale": ceil, **parts}))
        return torch.where(better, floor, ceil)

    def get(self, parts: Parts, k: int | None = None) -> Tensor:
        e = parts["scale"].int()
        if self.over == "block":
            return torch.where(e > 0, (e << 23).view(torch.float32), 2.0**-127)  # the byte is float32's own exponent
        return self._top(parts) * ((127 - e) << 23).view(torch.float32)

    def _top(self, parts: Parts) -> Tensor:
        return _under(parts["scale_top"], parts["scale"]) if self.over == "tensor" else parts["scale_top"]

    def row_bits(self, k: int) -> int:
        return 8 * k + (32 if self.over == "row" else 0)

    def tensor_bits(self) -> int:
        return 32 if self.over == "tensor" else 0


@dataclass(frozen=True)
class E4M3:
    """Eight-bit floats E4M3 (up to 448, smallest 2^-9), under one float32 of the tensor: Δ̂ = e4m3(Δ/t)·t with t = max Δ / 448.

    A block whose scale is below t/1024 decodes as zero. `over` "block" leaves t out.
    """

    over: Literal["tensor", "block"] = "tensor"

    def __post_init__(self) -> None:
        _one_of("over", self.over, ("tensor", "block"))

    @property
    def shared(self) -> frozenset[str]:
        return frozenset({"scale_top"} if self.over == "tensor" else ())

    @property
    def alone(self) -> str | None:
        return "e4m3" if self.over == "block" else None

    def put(self, scale: Float[Tensor, "*e m k"], loss: Loss) -> Parts:
        scale = stored(scale.float(), "fp32")
        if self.over == "block":
            if (scale > 464).any():  # what still rounds to 448
                raise Invalid("a block's scale is above 448 and does not fit e4m3: choose E4M3(over='tensor')")
            return {"scale": scale.clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8)}
        top = _over(scale, "tensor") / 448
        micro = torch.where(top.unsqueeze(-2) > 0, scale / top.unsqueeze(-2), 0.0).clamp(max=448)
        return {"scale": micro.to(torch.float8_e4m3fn).view(torch.uint8), "scale_top": top}

    def get(self, parts: Parts, k: int | None = None) -> Tensor:
        micro = _e4m3(str(parts["scale"].device)).take(parts["scale"].long())  # faster than the cast
        return micro * _under(parts["scale_top"], micro) if self.over == "tensor" else micro

    def row_bits(self, k: int) -> int:
        return 8 * k

    def tensor_bits(self) -> int:
        return 32 if self.over == "tensor" else 0


@dataclass(frozen=True)
class Double:
    """Double quantization: codes of `bits` bits, a second scale c of dtype `inner` for every `group` blocks of a row, an offset o.

        Δ̂ = level(q)·c + o,    c = max |Δ − o| over the group,    q nearest

    `offset`  o                  level(q)                               whose
    "mean"    mean of all Δ      the 256 values of dyn8; bits is 8      QLoRA as bitsandbytes ships it (Double(8, 256, "mean", "fp32"))
    "min"     least of all Δ     q / (2^bits − 1)                       LQ-LoRA's (b0, b1, B1) = (bits, inner, group)
    "zero"    none held          (q + 1) / 2^bits, so never zero        two-level: one scale for `group` blocks, a multiplier each
    """

    bits: int = 8
    group: int = 256
    offset: Literal["mean", "min", "zero"] = "mean"
    inner: Literal["fp32", "fp16", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        _one_of("offset", self.offset, ("mean", "min", "zero"))
        _one_of("inner", self.inner, tuple(STORES))
        if not (self.bits == 8 or (2 <= self.bits <= 8 and self.offset != "mean")):
            raise Invalid(f"Double(offset={self.offset!r}) has codes of {'8' if self.offset == 'mean' else '2 to 8'} bits, not {self.bits}")
        if self.group < 1:
            raise Invalid(f"Double needs groups of at least one block, not {self.group}")

    @property
    def shared(self) -> frozenset[str]:
        return frozenset(() if self.offset == "zero" else {"scale_offset"})

    @property
    def alone(self) -> None:
        return None

    def put(self, scale: Float[Tensor, "*e m k"], loss: Loss) -> Parts:
        scale, parts = stored(scale.float(), "fp32"), {}
        if self.offset != "zero":
            flat = scale.flatten(-2)
            o = flat.mean(-1, keepdim=True) if self.offset == "mean" else flat.amin(-1, keepdim=True)
            parts["scale_offset"] = o
            scale = scale - o.unsqueeze(-2)
        groups = cut(scale, self.group)  # (*e, m, groups, group)
        parts["scale_group"] = stored(groups.abs().amax(-1), self.inner)
        c = parts["scale_group"].float()[..., None]
        u = groups * torch.where(c >= 2.0**-126, 1 / c, 0.0)
        q = torch.bucketize(u.contiguous(), _middles(self.levels(), str(u.device)))
        return {"scale": pack(join(q.byte(), scale.shape[-1]), self.bits), **parts}

    def levels(self) -> tuple[float, ...]:
        """The value of every code at group scale 1, ascending."""
        if self.offset == "mean":
            return dyn8()
        top = 2**self.bits
        return tuple((q + 1) / top for q in range(top)) if self.offset == "zero" else tuple(q / (top - 1) for q in range(top))

    def get(self, parts: Parts, k: int | None = None) -> Tensor:
        packed, c = parts["scale"], parts["scale_group"].float()
        q = unpack(packed, self.bits, 8 * packed.shape[-1] // self.bits if k is None else k)
        level = _constant(self.levels(), str(q.device)).take(q.long())
        k = min(q.shape[-1], c.shape[-1] * self.group)
        scale = level[..., :k] * c.repeat_interleave(self.group, -1)[..., :k]
        return scale if self.offset == "zero" else scale + _under(parts["scale_offset"], scale)

    def row_bits(self, k: int) -> int:
        return 8 * row_bytes(k, self.bits) + n_blocks(k, self.group) * width(self.inner)

    def tensor_bits(self) -> int:
        return 0 if self.offset == "zero" else 32


@dataclass(frozen=True)
class Clustered:
    """K distinct scales a matrix and an index a block: Δ̂ = values[q], q nearest, values from K means over the scales in use."""

    K: int = 64
    steps: ClassVar[int] = 25

    def __post_init__(self) -> None:
        if self.K not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise Invalid(f"Clustered has K = 2, 4, 8 … 256 values, not {self.K}")

    @property
    def shared(self) -> frozenset[str]:
        return frozenset({"scale_values"})

    @property
    def alone(self) -> None:
        return None

    @property
    def bits(self) -> int:
        """Bits of one index."""
        return self.K.bit_length() - 1

    def put(self, scale: Float[Tensor, "*e m k"], loss: Loss) -> Parts:
        scale = stored(scale.float(), "fp32")
        flat = scale.reshape(-1, scale.shape[-2] * scale.shape[-1])
        values = torch.stack([self._means(one) for one in flat])
        q = torch.stack([torch.bucketize(one, (v[1:] + v[:-1]) / 2) for one, v in zip(flat, values, strict=True)])
        parts = {"scale_values": values.reshape(*scale.shape[:-2], self.K)}
        return {"scale": pack(q.byte().reshape(scale.shape), self.bits), **parts}

    def _means(self, x: Float[Tensor, " s"]) -> Float[Tensor, " K"]:
        x = x.sort().values
        at = (torch.arange(self.K, device=x.device) + 0.5) * (x.numel() / self.K)
        v = x[at.long().clamp(max=x.numel() - 1)]
        for _ in range(self.steps):  # K means in one dimension: cells are cut halfway, sums by cell come from one running sum
            edge = torch.searchsorted(x, (v[1:] + v[:-1]) / 2, right=True)
            edge = torch.cat([edge.new_zeros(1), edge, edge.new_full((1,), x.numel())])
            run = torch.cat([x.new_zeros(1, dtype=torch.float64), x.double().cumsum(0)])
            count = edge.diff()
            v = torch.where(count > 0, run[edge].diff() / count.clamp(min=1), v.double()).float().sort().values
        return v

    def get(self, parts: Parts, k: int | None = None) -> Tensor:
        packed, values = parts["scale"], parts["scale_values"]
        q = unpack(packed, self.bits, 8 * packed.shape[-1] // self.bits if k is None else k).long()
        return values.gather(-1, q.reshape(*values.shape[:-1], -1)).reshape(q.shape)

    def row_bits(self, k: int) -> int:
        return 8 * row_bytes(k, self.bits)

    def tensor_bits(self) -> int:
        return 32 * self.K


@functools.cache
def dyn8() -> tuple[float, ...]:
    """The 256 values of the signed dynamic-exponent map (Dettmers et al., arXiv:2110.02861v2, section 1.3), ascending.

    Decade 10^(i−6), i = 0 … 6, holds the middles of 2^i equal steps from 0.1 to 1; each with both signs, then 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return tuple(sorted(values))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise Invalid(f"{name} is {value!r}; it can be {', '.join(known)}")


def _under(shared: Tensor, main: Tensor) -> Tensor:
    """A part of the whole matrix (*e, c) as it stands beside a part of its rows (*e, m, k), or beside that of a single row (k,)."""
    return shared.unsqueeze(-2) if main.ndim > shared.ndim else shared


def _over(scale: Tensor, extent: str) -> Tensor:
    """The largest scale of every row (*e, m, 1), or of every matrix (*e, 1)."""
    return scale.amax(-1, keepdim=True) if extent == "row" else scale.flatten(-2).amax(-1, keepdim=True)


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=8)
def _e4m3(device: str) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


@functools.lru_cache(maxsize=64)
def _middles(values: tuple[float, ...], device: str) -> Tensor:
    v = _constant(values, device)
    return (v[1:] + v[:-1]) / 2


NAMED: dict[str, Store] = {"pow2": Pow2(), "e4m3": E4M3(), "double": Double(), "clustered": Clustered()}  # what a recipe may write in short
