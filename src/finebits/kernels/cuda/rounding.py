"""`quantize`: round-to-nearest of W (*e, m, n), codes packed as in finebits.blocks, scale and shift as in finebits.kernels.table.Rounding.

Where planes are aligned and blocks are multiples of 8 up to 4,096, a program holds whole blocks: it reads W once, finds their scales, rounds,
and packs eight codes to a word. Anything else takes two kernels: scales of blocks, then codes by eight columns, whose byte may hold two blocks.

The code of u on an uneven grid is found by a binary search of its midpoints, a load from the cache for each bit; on a uniform one by adding
and taking off 1.5 · 2^23.

Bytes: W once (twice by two kernels), codes and scales once. Instructions: 42, 56, 56 and 85 a weight at 2, 3, 4 and 8 bits, 41 to 46 on a
uniform grid; by two kernels about 200, half of them for the scales.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from finebits.blocks import n_blocks, row_bytes
from finebits.kernels.cuda.codes import planes_aligned
from finebits.kernels.cuda.language import rounded
from finebits.kernels.cuda.launch import FLOATS, on
from finebits.kernels.table import Rounding

STORES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@triton.jit
def _span(w, valid, peak, MINMAX: tl.constexpr, scale_type: tl.constexpr, AXIS: tl.constexpr):
    """Scale and shift of blocks along AXIS, rounded to their store; NaN counts as absent and shift is 0 for absmax."""
    seen = valid & (w == w)
    if MINMAX:
        low = tl.min(tl.where(seen, w, float("inf")), AXIS)
        high = tl.max(tl.where(seen, w, float("-inf")), AXIS)
    else:
        low = tl.zeros_like(tl.max(w, AXIS))
        high = tl.max(tl.where(seen, tl.minimum(tl.abs(w), 3.4028234663852886e38), 0.0), AXIS)
    return rounded(tl.div_rn(high - low, tl.zeros_like(high) + peak), scale_type), rounded(low, scale_type)


@triton.jit
def _rank(u, mids, order, n_mids, first, BITS: tl.constexpr, UNIFORM: tl.constexpr, FULL: tl.constexpr):
    """Code of each u (a block of any shape); FULL: there are 2^BITS - 1 mids."""
    top: tl.constexpr = 2**BITS - 1
    if UNIFORM:
        # Adding 1.5·2^23 rounds half to even; clamping to one past the grid first keeps |u| far below 2^22.
        u = tl.where(u == u, u, first)
        u = tl.minimum(tl.maximum(u, first - 1.0), first + top + 1.0)
        u = (u + 12582912.0) - 12582912.0
        rank = tl.minimum(tl.maximum(u - first, 0.0), top * 1.0).to(tl.int32)
    else:
        # Counts the mids that are not >= u, so that NaN lands above all of them, as in torch.bucketize.
        rank = tl.zeros(u.shape, tl.int32)
        for bit in tl.static_range(BITS):
            # A binary search; `at` is the mid that halves what is left.
            at = rank + ((2 ** (BITS - 1) >> bit) - 1)
            if FULL:
                mid = tl.load(mids + at)
            else:
                mid = tl.load(mids + at, mask=at < n_mids, other=float("inf"))
            rank = tl.where(mid >= u, rank, at + 1)
        if not FULL:
            rank = tl.minimum(rank, n_mids)
    return tl.load(order + rank).to(tl.int32)


@triton.jit
def _reciprocal(s):
    normal = s >= 1.1754943508222875e-38
    return tl.where(normal, tl.div_rn(tl.full(s.shape, 1.0, tl.float32), tl.where(normal, s, 1.0)), 0.0)


@triton.jit
def _quantize_units(
    W,
    codes,
    scale,
    shift,
    mids,
    order,
    n_mids,
    peak,
    first,
    blocks,
    n,
    k,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIFORM: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    EIGHTS: tl.constexpr,
):
    """One read of W: ROWS blocks of EIGHTS · 8 columns (BLOCK, filled up), each packed eight codes to a word."""
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = (block // k).to(tl.int64)
    start = block % k * BLOCK
    eight = tl.arange(0, EIGHTS)[None, :, None]
    j = tl.arange(0, 8)[None, None, :]
    inside = eight * 8 + j
    col = start[:, None, None] + inside
    valid = (block < blocks)[:, None, None] & (inside < BLOCK) & (col < n)
    w = tl.load(W + row[:, None, None] * n + col, mask=valid, other=0.0).to(tl.float32)
    flat = tl.reshape(w, (ROWS, EIGHTS * 8))
    flat_valid = tl.reshape(valid, (ROWS, EIGHTS * 8))
    s, low = _span(flat, flat_valid, peak, shift is not None, scale.dtype.element_ty, 1)
    tl.store(scale + block, s, mask=block < blocks)
    if shift is not None:
        tl.store(shift + block, low, mask=block < blocks)
        w -= low.to(tl.float32)[:, None, None]
    code = _rank(w * _reciprocal(s.to(tl.float32))[:, None, None], mids, order, n_mids, first, BITS, UNIFORM, FULL)
    code = tl.where(valid, code, 0)

    unit = start[:, None] // 8 + tl.arange(0, EIGHTS)[None, :]
    keep = (block < blocks)[:, None] & (tl.arange(0, EIGHTS)[None, :] * 8 < BLOCK) & (unit * 8 < n)
    base = codes + row[:, None] * ROW_BYTES
    if BITS == 8:
        word = tl.sum(code.to(tl.int64) << (j * 8), 2)
        tl.store(base.to(tl.pointer_type(tl.int64)) + unit, word, mask=keep)
    elif BITS == 4:
        tl.store(base.to(tl.pointer_type(tl.int32)) + unit, tl.sum(code << (j * 4), 2), mask=keep)
    else:
        tl.store(base.to(tl.pointer_type(tl.int16)) + unit, tl.sum((code & 3) << (j * 2), 2).to(tl.int16), mask=keep)
    if BITS == 3:
        tl.store(base + n // 4 + unit, tl.sum((code >> 2) << j, 2).to(tl.uint8), mask=keep)


@triton.jit
def _spans(W, scale, shift, peak, n, k, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Scale and shift of one block, read TILE columns at a time."""
    block = tl.program_id(0)
    row = (block // k).to(tl.int64)
    start = block % k * BLOCK
    MINMAX: tl.constexpr = shift is not None
    low = tl.full((TILE,), float("inf") if MINMAX else 0.0, tl.float32)
    high = tl.full((TILE,), float("-inf") if MINMAX else 0.0, tl.float32)
    for at in range(0, BLOCK, TILE):
        inside = at + tl.arange(0, TILE)
        valid = (inside < BLOCK) & (start + inside < n)
        w = tl.load(W + row * n + start + inside, mask=valid, other=0.0).to(tl.float32)
        seen = valid & (w == w)
        if MINMAX:
            low = tl.minimum(low, tl.where(seen, w, float("inf")))
            high = tl.maximum(high, tl.where(seen, w, float("-inf")))
        else:
            high = tl.maximum(high, tl.where(seen, tl.minimum(tl.abs(w), 3.4028234663852886e38), 0.0))
    span, floor = tl.max(high, 0), tl.min(low, 0)
    tl.store(scale + block, rounded(tl.div_rn(span - floor, peak + tl.zeros_like(span)), scale.dtype.element_ty))
    if MINMAX:
        tl.store(shift + block, rounded(floor, shift.dtype.element_ty))


@triton.jit
def _plane(base, code, unit, keep, bytes, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Stores the low WIDTH bits of codes (TILE, 8) as bytes; the last byte of a plane may be past its end."""
    PER: tl.constexpr = 8 // WIDTH
    part = tl.reshape(code & (2**WIDTH - 1), (TILE, WIDTH, PER))
    byte = tl.sum(part << (tl.arange(0, PER) * WIDTH)[None, None, :], 2)
    at = unit[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(base[:, None] + at, byte.to(tl.uint8), mask=keep[:, None] & (at < bytes))


@triton.jit
def _quantize_any(
    W,
    codes,
    scale,
    shift,
    mids,
    order,
    n_mids,
    first,
    units,
    per_row,
    n,
    k,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIFORM: tl.constexpr,
    FULL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Codes under given scales; a byte may hold columns of two blocks."""
    unit = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = (unit // per_row).to(tl.int64)
    part = unit % per_row
    keep = unit < units
    col = part[:, None] * 8 + tl.arange(0, 8)[None, :]
    valid = keep[:, None] & (col < n)
    u = tl.load(W + row[:, None] * n + col, mask=valid, other=0.0).to(tl.float32)
    block = row[:, None] * k + col // BLOCK
    if shift is not None:
        u -= tl.load(shift + block, mask=valid, other=0.0).to(tl.float32)
    u *= _reciprocal(tl.load(scale + block, mask=valid, other=0.0).to(tl.float32))
    code = tl.where(valid, _rank(u, mids, order, n_mids, first, BITS, UNIFORM, FULL), 0)
    base = codes + row * ROW_BYTES
    if BITS == 3:
        _plane(base, code, part, keep, (n + 3) // 4, 2, TILE)
        _plane(base + (n + 3) // 4, code >> 2, part, keep, (n + 7) // 8, 1, TILE)
    else:
        _plane(base, code, part, keep, (n * BITS + 7) // 8, BITS, TILE)


def quantize(W: Tensor, r: Rounding) -> tuple[Tensor, Tensor, Tensor | None]:
    W = (W if W.dtype in FLOATS else W.float()).contiguous()
    *lead, n = W.shape
    rows, k, size, store = math.prod(lead), n_blocks(n, r.block), row_bytes(n, r.bits), STORES[r.store]
    codes = torch.empty(*lead, size, dtype=torch.uint8, device=W.device)
    scale = torch.empty(*lead, k, dtype=store, device=W.device)
    shift = None if r.mode == "absmax" else torch.empty_like(scale)
    if not W.numel():
        return codes, scale, shift
    mids, order, peak, first = r.mids.contiguous(), r.order.contiguous(), float(r.peak), float(r.first)
    with on(W.device):
        if r.block % 8 == 0 and r.block <= 4096 and planes_aligned(codes, n, r.bits) and rows * k < 2**31 - 1024:
            eights = triton.next_power_of_2(min(r.block, n)) // 8
            eights, together = max(1, eights), max(1, 256 // max(1, eights))
            _quantize_units[(triton.cdiv(rows * k, together),)](
                W,
                codes,
                scale,
                shift,
                mids,
                order,
                mids.numel(),
                peak,
                first,
                rows * k,
                n,
                k,
                size,
                r.bits,
                r.block,
                r.uniform,
                mids.numel() == 2**r.bits - 1,
                together,
                eights,
                num_warps=4 if eights * together <= 256 else 8,
                enable_fp_fusion=False,
            )
        else:
            tile = min(2048, triton.next_power_of_2(r.block))
            _spans[(rows * k,)](W, scale, shift, peak, n, k, r.block, tile, num_warps=4 if tile > 256 else 1, enable_fp_fusion=False)
            units, per_row, tile = rows * -(-n // 8), -(-n // 8), 128
            _quantize_any[(triton.cdiv(units, tile),)](
                W,
                codes,
                scale,
                shift,
                mids,
                order,
                mids.numel(),
                first,
                units,
                per_row,
                n,
                k,
                size,
                r.bits,
                r.block,
                r.uniform,
                mids.numel() == 2**r.bits - 1,
                tile,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return codes, scale, shift
