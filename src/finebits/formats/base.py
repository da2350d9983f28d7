"""What a number format is: a block of reals <-> codes and scales.

A format is a frozen dataclass: hashable, printable, and data for a plan. It knows numbers and nothing else: no algorithm, no module, no
kernel. Blocks run along the last dimension (the inputs of a linear layer) and never leave a row, nor a unit of a row.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from finebits import blocks
from finebits.blocks import n_blocks, pack, row_bytes, unpack
from finebits.errors import Invalid
from finebits.formats._stores import NAMED, Parts, Plain, Store, stored
from finebits.kernels.reference import STORES, encode
from finebits.kernels.table import Rounding, Table

SLAB = 1 << 20  # weights that are looked at together where a whole matrix is not needed
LAYOUTS = ("row", "tensor")  # blocks without a width: one scale a row, one scale a matrix


class Scales(NamedTuple):
    """What decoding uses, w = level·scale (+ shift), one of each a block, in any dtype that holds them exactly.

    >>> fb.Int(4, symmetric=False).ideal(torch.tensor([[1.0, 16.0]]))  # 15 steps of 1 from the minimum 1
    Scales(scale=tensor([[1.]]), shift=tensor([[1.]]), book=None)
    """

    scale: Float[Tensor, "*r k"]
    shift: Float[Tensor, "*r k"] | None = None
    book: Tensor | None = None  # what else decoding looks up, where a format has it


class Format(ABC):
    """Abstract. A concrete format says its levels; scales, codes and storage follow, and it overrides what is different in its paper.

    A concrete format is a frozen dataclass; what it fixes for good is a class constant, what may be chosen is a field.

    >>> fb.NF(4, block=64, scale="bf16").storage_bits(8, 128)  # 8 · (128 · 4 + 2 · 16)
    4352
    >>> fb.NF(9)
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: NF has 2, 3, 4, 5, 6, 7, 8 bits, not 9
    """

    bits: int  # of one code
    block: int | str  # columns that share a scale (the last block of a row may be short), or "row" or "tensor"
    scale: str | Store  # how a scale is held: "fp32", "fp16", "bf16", or a store of _stores.py (its name stands for its defaults)
    unit: int | None = None  # columns of a unit (a head): blocks begin anew at every unit
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)  # the code widths that this format is made for
    plain: ClassVar[bool] = True  # absmax or minmax scales: with a plain store, round-to-nearest is one fused pass
    still: ClassVar[bool] = True  # what is on the grid stays there when scales are found anew, so that a trained weight can be written back

    def __post_init__(self) -> None:
        if self.bits not in self.widths:
            raise Invalid(f"{type(self).__name__} has {', '.join(map(str, self.widths))} bits, not {self.bits}")
        if self.block not in LAYOUTS and not (isinstance(self.block, int) and 16 <= self.block <= 4096):
            raise Invalid(f"block is {self.block!r}; it can be 16 to 4096 columns, 'row' or 'tensor'")
        if isinstance(self.scale, str) and self.scale not in (*STORES, *NAMED):
            raise Invalid(f"scale is {self.scale!r}; it can be {', '.join((*STORES, *NAMED))}")
        if isinstance(self.scale, str) and self.scale in NAMED:
            object.__setattr__(self, "scale", NAMED[self.scale])
        if isinstance(self.scale, Plain):
            object.__setattr__(self, "scale", self.scale.dtype)
        if self.block == "tensor" and not isinstance(self.scale, str):
            raise Invalid(f"one scale a matrix is held plain ({', '.join(STORES)}), not as {self.scale}")
        if self.unit is not None and (self.unit < 16 or self.block in LAYOUTS):
            raise Invalid(
                f"unit is {self.unit} with block {self.block!r}; a unit has at least 16 columns, and blocks of a width restart in it"
            )

    # What a format says

    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """The value of every code at scale 1, in the order of the codes: 2**bits of them.

        >>> fb.Int(2).levels()  # −1, 0, 1, and the unused code
        (-1.0, 0.0, 1.0, 1.0)
        """

    def ideal(self, W: Float[Tensor, "*r n"]) -> Scales:
        """The scales that suit W, float32, before they are stored: absmax over the largest level.

        >>> fb.Int(4).ideal(torch.tensor([[3.5, -7.0]])).scale  # 7 is the largest level
        tensor([[1.]])
        """
        return Scales(self.cut(W.float()).abs().amax(-1) / self.peak)

    def spanning(self, W: Float[Tensor, "*r n"]) -> Scales:
        """Scales under which no weight lies outside of the levels and what is on the grid stays there: those of a weight that is trained.

        >>> fb.Int(4, variant="full").spanning(torch.tensor([[3.5, -8.0]])).scale  # -8 is the least level
        tensor([[1.]])
        """
        return self.ideal(W)

    # How scales are held

    @property
    def store(self) -> Store:
        """How scales are held."""
        return Plain(self.scale) if isinstance(self.scale, str) else self.scale

    @property
    def shared(self) -> frozenset[str]:
        """Names of the parts that belong to a whole matrix: they are held once and lead with its experts only, not with its rows.

        >>> sorted(fb.Int(4, block="tensor").shared), sorted(fb.Int(4).shared)
        (['scale', 'shift', 'zero'], [])
        """
        return frozenset({"scale", "shift", "zero"}) if self.block == "tensor" else self.store.shared

    def fit(self, W: Float[Tensor, "*r n"]) -> Parts:
        """Scales for W as they will be stored: tensors that lead with W's leading dimensions (shared parts: all but the rows).

        >>> {k: tuple(p.shape) for k, p in fb.Int(4, block=64, symmetric=False).fit(torch.randn(3, 100)).items()}  # two blocks a row
        {'scale': (3, 2), 'shift': (3, 2)}
        """
        ideal = self.ideal(W) if self.block == "tensor" else Scales(*by_rows(self.ideal, W))
        return self.hold(ideal, W)

    def hold(self, scales: Scales, W: Float[Tensor, "*r n"]) -> Parts:
        """Given scales as they will be stored. A quantizer that searches its own scales hands them over here."""

        def error(w: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor]:
            at = self.at(scale, shift)
            return (self.cut(self.decode(self.encode(w, at), at) - w.float()).square().sum(-1),)

        def loss(scale: Tensor) -> Tensor:
            return by_rows(error, W, scale, scales.shift)[0]

        parts = self.store.put(scales.scale, loss)
        parts |= self.beside(self.store.get(parts, scales.scale.shape[-1]), scales.shift)
        return {k: p.squeeze(-2) for k, p in parts.items()} if self.block == "tensor" else parts

    def rescaled(self, parts: Parts, scale: Float[Tensor, "*r k"], shift: Float[Tensor, "*r k"] | None = None) -> Parts:
        """Stored parts with other scales, and other shifts where `parts` hold them, under the same codes; a zero point stays as it is."""
        # what a code is off by grows with what its scale is off by
        scale_parts = self.store.put(scale, lambda other: (other - scale).square())
        scale_parts |= {} if shift is None else {"shift": stored(shift, str(self.scale))}
        return parts | ({k: p.squeeze(-2) for k, p in scale_parts.items()} if self.block == "tensor" else scale_parts)

    def beside(self, scale: Tensor, shift: Tensor | None) -> Parts:
        """What is held beside the scale, given the scale that decoding will use."""
        return {} if shift is None else {"shift": stored(shift, str(self.scale))}

    def at(self, scale: Tensor, shift: Tensor | None) -> Scales:
        """What decoding would use if `scale` were what the store gives back."""
        return Scales(scale, shift)

    def scales(self, parts: Parts, n: int | None = None) -> Scales:
        """What decoding will use, read from the stored parts.

        Without the number of columns n, a store that packs its codes may give surplus blocks at the end of a row; they mean nothing.

        >>> format, W = fb.Int(4, scale="fp16"), torch.tensor([[3.5, -7.0]])
        >>> format.scales(format.fit(W)).scale
        tensor([[1.]], dtype=torch.float16)
        """
        if self.block == "tensor":
            alone = "codes" in parts and parts["codes"].ndim == parts["scale"].ndim  # a single row, cut out of its matrix
            parts = {k: p if alone else p.unsqueeze(-2) for k, p in parts.items() if k in self.shared}
        return Scales(self.store.get(parts, None if n is None else self.n_blocks(n)), parts.get("shift"))

    # Blocks of a row

    def n_blocks(self, n: int) -> int:
        """Blocks in a row of n columns.

        >>> fb.NF(4, block=64).n_blocks(100), fb.NF(4, block=64, unit=96).n_blocks(192), fb.NF(4, block="row").n_blocks(100)
        (2, 4, 1)
        """
        if isinstance(self.block, str):
            return 1
        if self.unit is None:
            return n_blocks(n, self.block)
        return n // self.unit * n_blocks(self.unit, self.block) + n_blocks(n % self.unit, self.block)

    def cut(self, W: Shaped[Tensor, "*r n"], fill: float = 0.0) -> Shaped[Tensor, "*s k block"]:
        """Rows -> blocks, short ones filled up. With one scale a matrix, all its rows are one block.

        >>> fb.NF(4, block=64).cut(torch.ones(3, 100)).shape
        torch.Size([3, 2, 64])
        """
        if isinstance(self.block, str):
            return W.unsqueeze(-2) if self.block == "row" else W.flatten(-2)[..., None, None, :]
        if self.unit is None:
            return blocks.cut(W, self.block, fill)
        units = blocks.cut(W, self.unit, fill)
        return blocks.cut(units, self.block, fill).flatten(-3, -2)[..., : self.n_blocks(W.shape[-1]), :]

    def spread(self, per_block: Shaped[Tensor, "*r k"], n: int) -> Shaped[Tensor, "*r n"]:
        """One value a block -> one value a column.

        >>> fb.NF(4, block=16).spread(torch.tensor([[1.0, 2.0]]), 18)[0, 14:]
        tensor([1., 1., 2., 2.])
        """
        if self.unit is None:
            return blocks.spread(per_block, n if isinstance(self.block, str) else self.block, n)
        return per_block[..., self._block_of(torch.arange(n, device=per_block.device))]

    def _block_of(self, column: Tensor) -> Tensor:
        assert self.unit is not None and isinstance(self.block, int)
        return column // self.unit * n_blocks(self.unit, self.block) + column % self.unit // self.block

    def row_codes(self, n: int) -> int:
        """Codes in a row of n columns.

        >>> fb.NF(4).row_codes(128), fb.VQ(M=2, g=8).row_codes(128)  # two indices for eight weights
        (128, 32)
        """
        return n

    def columns(self, row_codes: int) -> int:
        """Columns of a row of so many codes: the inverse of `row_codes`."""
        return row_codes

    def storage_bits(self, m: int, n: int) -> int:
        """Exact storage of an (m, n) weight in bits: codes, scales and padding. The planner's price tag.

        >>> fb.NF(4, block=64).storage_bits(8, 128) / (8 * 128)  # bits a weight: 4 and 32 / 64
        4.5
        """
        codes = 8 * row_bytes(self.row_codes(n), self.bits)
        if self.block == "tensor":
            return m * codes + self.scale_bits(n)
        return m * (codes + self.scale_bits(n)) + self.tensor_bits(n)

    def scale_bits(self, n: int) -> int:
        """Bits that the scales (and shifts) of one row take; of one matrix, if it has one scale.

        >>> fb.NF(4, block=64, scale="bf16").scale_bits(128)  # two blocks
        32
        """
        return self.store.row_bits(self.n_blocks(n))

    def tensor_bits(self, n: int) -> int:
        """Bits that are held once for a matrix.

        >>> fb.NF(4, scale="e4m3").tensor_bits(128), fb.NF(4).tensor_bits(128)  # one float32 over all scales of a matrix
        (32, 0)
        """
        return self.store.tensor_bits()

    # Codes

    @property
    def peak(self) -> float:
        """The largest magnitude of a level: what the largest weight of a block is scaled to.

        >>> fb.Int(4).peak, fb.NF(4).peak
        (7.0, 1.0)
        """
        return max(abs(v) for v in self.levels())

    def grid(self, device: torch.device) -> Rounding:
        """How codes are chosen under given scales."""
        return grid_rounding(self.levels(), self.peak, str(device), *self._kernel())

    def _kernel(self) -> tuple[str, int, int]:
        return (self.scale if isinstance(self.scale, str) else "fp32"), self.bits, (self.block if isinstance(self.block, int) else 0)

    def rounding(self, device: torch.device) -> Rounding | None:
        """How the kernels round a whole matrix in one pass; None where scales are found or held in another way: then fit and encode."""
        fused = self.plain and isinstance(self.scale, str) and isinstance(self.block, int) and self.unit is None
        return self.grid(device) if fused else None

    def encode(self, W: Float[Tensor, "*r n"], scales: Scales) -> UInt8[Tensor, "*r n"]:
        """The nearest code under given scales, one a byte.

        >>> fb.Int(4).encode(torch.tensor([[7.0, 1.4]]), Scales(torch.tensor([[1.0]])))  # 7 and 1, with 0 as code 7
        tensor([[14, 8]], dtype=torch.uint8)
        """
        n, grid = W.shape[-1], self.grid(W.device)
        if isinstance(self.block, int) and self.unit is None:
            return encode(W, scales.scale, scales.shift, grid)
        shift = None if scales.shift is None else self.spread(scales.shift, n)
        return encode(W, self.spread(scales.scale, n), shift, grid._replace(block=1))

    def packed(self, W: Float[Tensor, "*e m n"], scales: Scales) -> UInt8[Tensor, "*e m bytes"]:
        """The nearest codes of a whole weight, packed.

        >>> fb.Int(4).packed(torch.tensor([[7.0, 1.4]]), Scales(torch.tensor([[1.0]])))  # 14 + 16 · 8
        tensor([[142]], dtype=torch.uint8)
        """

        def codes(w: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor]:
            return (pack(self.encode(w, Scales(scale, shift, scales.book)), self.bits),)

        return by_rows(codes, W, scales.scale, scales.shift)[0]

    def decode(self, codes: UInt8[Tensor, "*r n"], scales: Scales) -> Float[Tensor, "*r n"]:
        """The float32 value of every code.

        >>> fb.Int(4).decode(torch.tensor([[14, 8]], dtype=torch.uint8), Scales(torch.tensor([[0.5]])))
        tensor([[3.5000, 0.5000]])
        """
        n = codes.shape[-1]
        w = level_tensor(self.levels(), codes.device).take(codes.long()) * self.spread(scales.scale.float(), n)
        return w if scales.shift is None else w + self.spread(scales.shift.float(), n)

    # The whole weight

    def table(self, parts: Parts, n: int) -> Table | None:
        """The stored weight as the kernels see it; None where it has no such form: then `dense`."""
        scale, shift, _ = self.scales(parts, n)
        lead = parts["codes"].shape[:-1]
        step = self.block
        if isinstance(self.block, str):
            step = -(-n // 64) * 64
        elif self.unit is not None and self.unit % self.block and n > self.unit:
            step = math.gcd(self.unit, self.block)
            if step < 16:
                return None
            at = self._block_of(torch.arange(0, n, step, device=scale.device))
            scale, shift = scale[..., at], None if shift is None else shift[..., at]
        if self.block == "tensor":
            scale, shift = scale.expand(*lead, 1).contiguous(), None if shift is None else shift.expand(*lead, 1)
        shift = None if shift is None else shift.float().contiguous()
        return Table(parts["codes"], scale, shift, level_tensor(self.levels(), scale.device), self.bits, int(step), n)

    def dense(self, parts: Parts, n: int) -> Float[Tensor, "*r n"]:
        """The float32 weight, without the kernels.

        >>> q = fb.quantize(torch.randn(2, 64), fb.NF(4))
        >>> torch.equal(fb.NF(4).dense(q.parts, 64), q.dequantize())
        True
        """
        return self.decode(unpack(parts["codes"], self.bits, self.row_codes(n)), self.scales(parts, n))


def by_rows(f: Callable, W: Tensor, *beside: Tensor | None) -> tuple[Any, ...]:
    """f(W, *beside) a million weights at a time: what it makes on the way stays small. Whatever has one row goes to every call whole.

    >>> by_rows(lambda w: (w.sum(-1, keepdim=True),), torch.ones(3, 4))
    (tensor([[4.], [4.], [4.]]),)
    """
    m = W.shape[-2] if W.ndim > 1 else 1
    step = max(1, SLAB * m // max(W.numel(), 1))
    if step >= m:
        return tuple(f(W, *beside))
    cut = lambda t, i: t if t is None or t.shape[-2] == 1 else t[..., i : i + step, :]  # noqa: E731
    pieces = [f(cut(W, i), *(cut(t, i) for t in beside)) for i in range(0, m, step)]
    return tuple(None if p[0] is None else torch.cat(p, -2) for p in zip(*pieces, strict=True))


@functools.lru_cache(maxsize=256)
def _constant(values: tuple, dtype: torch.dtype, device: str) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def level_tensor(levels: tuple[float, ...], device: torch.device) -> Float[Tensor, " levels"]:
    """The levels as a float32 tensor on `device`; made once.

    >>> level_tensor(fb.Int(2).levels(), torch.device("cpu"))
    tensor([-1.,  0.,  1.,  1.])
    """
    return _constant(levels, torch.float32, str(device))


@functools.lru_cache(maxsize=256)
def grid_rounding(levels: tuple[float, ...], peak: float, device: str, store: str, bits: int, block: int) -> Rounding:
    """Round-to-nearest on any grid: absmax scale, then the midpoints between neighbours. Of codes with one value, the lowest is used.

    >>> grid_rounding((0.0, 1.0, 4.0), 4.0, "cpu", "fp32", 2, 64).mids
    tensor([0.5000, 2.5000])
    """
    rank = sorted(range(len(levels)), key=levels.__getitem__)
    grid = torch.tensor([levels[i] for i in rank], dtype=torch.float32, device=device)
    mids = ((grid[1:] + grid[:-1]) / 2).tolist()
    for i in reversed(range(len(mids))):
        if grid[i] == grid[i + 1]:  # an empty cell: nothing lies above this midpoint and below the next
            mids[i] = mids[i + 1] if i + 1 < len(mids) else math.inf
    order = _constant(tuple(rank), torch.uint8, device)
    return Rounding("absmax", peak, store, False, 0, torch.tensor(mids, dtype=torch.float32, device=device), order, bits, block)
