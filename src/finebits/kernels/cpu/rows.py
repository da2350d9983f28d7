"""The rows of a packed weight, as the library wants them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finebits.blocks import n_blocks, row_bytes
from finebits.errors import Invalid
from finebits.kernels.cpu.binding import DTYPES, Dequantize, Packed, call
from finebits.kernels.table import Table


class PackedRows:
    """All rows of a table, experts one after the other, as the library wants them."""

    def __init__(self, t: Table):
        *lead, nbytes = t.codes.shape
        k = n_blocks(t.n, t.block)
        shift = t.shift
        if nbytes != row_bytes(t.n, t.bits) or t.codes.dtype != torch.uint8 or t.levels.numel() < 2**t.bits:
            raise Invalid(f"{t.n} codes of {t.bits} bits take {row_bytes(t.n, t.bits)} bytes a row and {2**t.bits} levels, "
                             f"not {t.codes.dtype} {tuple(t.codes.shape)} and {t.levels.numel()} levels")  # fmt: skip
        for per_block in (t.scale,) if shift is None else (t.scale, shift):
            if per_block.shape != (*lead, k) or per_block.dtype not in DTYPES:
                raise Invalid(f"a weight {(*lead, t.n)} in blocks of {t.block} has {(*lead, k)} scales, not {tuple(per_block.shape)}")
        codes, scale, levels = t.codes.contiguous(), t.scale.contiguous(), t.levels.float().contiguous()
        shift = None if shift is None else shift.float().contiguous()
        self.kept = codes, scale, shift, levels
        self.at, self.lead = self.pointers(), tuple(lead)
        self.struct = Packed(*self.at, math.prod(lead), t.n, nbytes, k, t.block, t.bits, DTYPES[scale.dtype])

    def pointers(self) -> tuple[int, int, int | None, int]:
        codes, scale, shift, levels = self.kept
        return codes.data_ptr(), scale.data_ptr(), None if shift is None else shift.data_ptr(), levels.data_ptr()

    def between(self, first: int, last: int) -> Packed:
        """Rows [first, last)."""
        s, at = self.struct, first * self.struct.blocks
        return Packed(
            s.codes + first * s.row_bytes,
            s.scale + at * self.kept[1].itemsize,
            None if s.shift is None else s.shift + at * 4,
            s.levels,
            *(last - first, s.n, s.row_bytes, s.blocks, s.block, s.bits, s.store),
        )

    def expert(self, e: int, m: int) -> PackedRows:
        rows = object.__new__(PackedRows)
        rows.kept, rows.struct = self.kept, self.between(e * m, (e + 1) * m)
        return rows


def rows_of(t: Table) -> PackedRows:
    """Kept with the table, where it reads the table's own tensors and these are where they were (share_memory_ moves them)."""
    rows = t.__dict__.get("rows")
    if rows is None or rows.at != rows.pointers():
        rows = PackedRows(t)
        if all(kept is own for kept, own in zip(rows.kept, (t.codes, t.scale, t.shift, t.levels))):
            t.__dict__["rows"] = rows
    return rows


def decode(rows: PackedRows, out: Tensor, start: int, stop: int, first: int = 0, last: int | None = None) -> None:
    table = rows.struct if last is None else rows.between(first, last)
    call("dequantize", Dequantize(table, out.data_ptr(), start, stop, stop - start, DTYPES[out.dtype]))
