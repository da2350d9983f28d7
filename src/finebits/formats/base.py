"""What a number format is: a block of reals <-> codes and scales.

A format is a frozen dataclass: hashable, printable, and data for a plan. It knows numbers and nothing else: no algorithm, no module, no
kernel. Blocks run along the last dimension (the inputs of a linear layer) and never leave a row.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from finebits.blocks import cut, n_blocks, row_bytes, spread
from finebits.kernels.reference import STORES, encode
from finebits.kernels.table import Rounding, Table

Parts = dict[str, Tensor]


class Scales(NamedTuple):
    """What decoding uses, w = level·scale (+ shift), one of each a block, in any dtype that holds them exactly."""

    scale: Float[Tensor, "*r k"]
    shift: Float[Tensor, "*r k"] | None = None


class Format(ABC):
    """Abstract. A concrete format says its levels and how its scales are found and stored; the rest follows from the table of kernels.

    A concrete format is a frozen dataclass with at least these three fields.
    """

    bits: int  # of one code
    block: int  # columns that share a scale; the last block of a row may be short
    scale: str  # how a scale is held: "fp32", "fp16", "bf16"
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)  # the code widths that this format is made for

    def __post_init__(self) -> None:
        if self.bits not in self.widths:
            raise ValueError(f"{type(self).__name__} has {', '.join(map(str, self.widths))} bits, not {self.bits}")
        if not 16 <= self.block <= 4096:
            raise ValueError(f"block is {self.block}; it can be 16 to 4096 columns")
        if self.scale not in STORES:
            raise ValueError(f"scale is {self.scale!r}; it can be {', '.join(STORES)}")

    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """The value of every code at scale 1, in the order of the codes: 2**bits of them."""

    @abstractmethod
    def rounding(self, device: torch.device) -> Rounding:
        """How round-to-nearest finds scale and code."""

    @abstractmethod
    def fit(self, W: Float[Tensor, "*r n"]) -> Parts:
        """Scales for W as they will be stored: tensors that lead with W's leading dimensions."""

    @abstractmethod
    def scales(self, parts: Parts) -> Scales:
        """What decoding will use, read from the stored parts."""

    @abstractmethod
    def scale_bits(self) -> int:
        """Bits that the scale of one block takes, zero point included."""

    def storage_bits(self, m: int, n: int) -> int:
        """Exact storage of an (m, n) weight in bits: codes, scales and padding. The planner's price tag."""
        return m * (8 * row_bytes(n, self.bits) + n_blocks(n, self.block) * self.scale_bits())

    def encode(self, W: Float[Tensor, "*r n"], scales: Scales) -> UInt8[Tensor, "*r n"]:
        """The nearest code under given scales, one a byte."""
        return encode(W, scales.scale, scales.shift, self.rounding(W.device))

    def decode(self, codes: UInt8[Tensor, "*r n"], scales: Scales) -> Float[Tensor, "*r n"]:
        """The float32 value of every code."""
        n = codes.shape[-1]
        w = level_tensor(self.levels(), codes.device)[codes.long()] * spread(scales.scale.float(), self.block, n)
        return w if scales.shift is None else w + spread(scales.shift.float(), self.block, n)

    def table(self, parts: Parts, n: int) -> Table:
        """The stored weight as the kernels see it."""
        scale, shift = self.scales(parts)
        levels = level_tensor(self.levels(), parts["codes"].device)
        return Table(parts["codes"], scale, None if shift is None else shift.float(), levels, self.bits, self.block, n)


def absmax(W: Float[Tensor, "*r n"], block: int) -> Float[Tensor, "*r k"]:
    """The largest magnitude of every block."""
    return cut(W.float(), block).abs().amax(-1)


def stored(scale: Tensor, store: str) -> Tensor:
    """Scales rounded to their store; raises if one does not fit."""
    out = scale.to(STORES[store])
    if not torch.isfinite(out).all():
        raise ValueError(f"a block's scale does not fit {store}: choose a wider scale store, or look for Inf and NaN in the weight")
    return out


def width(store: str) -> int:
    """Bits of one stored scale."""
    return STORES[store].itemsize * 8


@functools.lru_cache(maxsize=256)
def _constant(values: tuple, dtype: torch.dtype, device: str) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def level_tensor(levels: tuple[float, ...], device: torch.device) -> Float[Tensor, " levels"]:
    """The levels as a float32 tensor on `device`; made once."""
    return _constant(levels, torch.float32, str(device))


@functools.lru_cache(maxsize=256)
def grid_rounding(levels: tuple[float, ...], store: str, bits: int, block: int, device: str) -> Rounding:
    """Round-to-nearest on any grid: absmax scale, then the midpoints between neighbours."""
    rank = sorted(range(len(levels)), key=levels.__getitem__)
    grid = torch.tensor([levels[i] for i in rank], dtype=torch.float32, device=device)
    peak = max(abs(v) for v in levels)
    return Rounding("absmax", peak, store, False, 0, (grid[1:] + grid[:-1]) / 2, _constant(tuple(rank), torch.uint8, device), bits, block)
