"""`dequantize`: packed codes (*e, m, bytes), scale and shift (*e, m, k) -> the dense weight (*e, m, n).

    w = round(levels[code] · scale + shift)    product, then sum, each rounded to float32: no fused multiply-add, so that bits agree

Where planes are aligned and blocks are multiples of 8, a lane takes units of eight columns: one word of codes, one scale, one 16-byte store
in a 2-byte dtype. Anything else goes column by column.

Bytes: codes and scales once, the dense weight once. Instructions: 13 a weight by units (16 for 3 bits), 24 to 38 by columns.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from finebits.blocks import n_blocks, row_bytes
from finebits.kernels.cuda.codes import eight_codes, planes_aligned, weight_at
from finebits.kernels.cuda.language import rounded
from finebits.kernels.cuda.launch import FLOATS, launch, on
from finebits.kernels.table import Table


@triton.jit
def _dequantize_any(
    out, codes, scale, shift, levels, n, k, ROW_BYTES: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    row = tl.full((TILE,), 0, tl.int64) + tl.program_id(0)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = col < n
    w = weight_at(codes, scale, shift, levels, row, col, n, k, ROW_BYTES, BITS, BLOCK, mask)
    tl.store(out + row * n + col, rounded(w, out.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_units(
    out,
    codes,
    scale,
    shift,
    levels,
    units,
    per_row,
    k,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Eight columns at a time: one word of codes, one scale and one 16-byte store (for 2-byte dtypes)."""
    unit = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = unit < units
    row = unit // per_row
    part = unit % per_row
    j = tl.arange(0, 8)[None, :]
    code = eight_codes(codes + row.to(tl.int64) * ROW_BYTES, part, per_row, mask, j, BITS)
    block = row.to(tl.int64) * k + part * 8 // BLOCK
    w = tl.load(levels + code) * tl.load(scale + block, mask=mask, other=0.0).to(tl.float32)[:, None]
    if shift is not None:
        w += tl.load(shift + block, mask=mask, other=0.0)[:, None]
    tl.store(out + unit.to(tl.int64)[:, None] * 8 + j, rounded(w, out.dtype.element_ty), mask=mask[:, None])


def dequantize(t: Table, dtype: torch.dtype) -> Tensor:
    codes, scale, levels = t.codes.contiguous(), t.scale.contiguous(), t.levels.contiguous()
    shift = None if t.shift is None else t.shift.contiguous()
    rows, n, k = math.prod(codes.shape[:-1]), t.n, n_blocks(t.n, t.block)
    kind = dtype if dtype in FLOATS else torch.float32
    out = torch.empty(*codes.shape[:-1], n, dtype=kind, device=codes.device)
    if out.numel():
        size = row_bytes(n, t.bits)
        with on(codes.device):
            if t.block % 8 == 0 and planes_aligned(codes, n, t.bits) and rows * n // 8 < 2**31 - 1024:
                units, tile = rows * n // 8, 512
                grid, tensors = (-(-units // tile), 1, 1), (out, codes, scale, shift, levels)
                constants = (size, t.bits, t.block, tile)
                launch(_dequantize_units, grid, tensors, (units, n // 8, k), constants, num_warps=4, enable_fp_fusion=False)
            else:
                tile = min(1024, triton.next_power_of_2(n))
                _dequantize_any[(rows, triton.cdiv(n, tile))](
                    out, codes, scale, shift, levels, n, k, size, t.bits, t.block, tile, num_warps=4, enable_fp_fusion=False
                )
    return out.to(dtype)
