"""Products of few tokens in float32, without tensor cores: any block, any dtype.

    by_lanes               out (e, tokens, m) = x (e, tokens, n) @ Wᵀ
    by_lanes_transposed    out (e, tokens, n) = x (e, tokens, m) @ W

By units, where planes are aligned and blocks are multiples of 8: tiles are (units, rows, tokens), and a lane holds one unit of eight columns of
every row of its tile, so that nothing moves between lanes until the end. The scale multiplies sums over eight columns. Otherwise, and
transposed, tiles are (tokens, rows, columns) of weights decoded one by one.

Bytes: codes and scales once for every four tokens. x comes from the cache, once a tile of rows: 4 by units, 8 otherwise. Transposed, rows are
split among programs, whose float32 results are written and read again (`folding`).
Instructions, for one token: 8 a weight by units (11 for 3 bits), one of which loads its level; otherwise 16 to 20 (32 for 3 bits).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from finebits.blocks import n_blocks, row_bytes
from finebits.kernels.cuda.codes import planes_aligned, weight_at
from finebits.kernels.cuda.folding import folded
from finebits.kernels.cuda.language import rounded, words
from finebits.kernels.cuda.launch import INTERPRETED, launch


@triton.jit
def _lanes(
    out,
    x,
    codes,
    scale,
    shift,
    levels,
    m,
    k,
    tokens,
    n: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out (e, tokens, m) = x (e, tokens, n) @ Wᵀ, for ROWS rows and TOKENS tokens; programs: rows, tokens, experts."""
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    acc = tl.zeros((TOKENS, ROWS, COLS), tl.float32)
    at = (expert * m + row)[:, None]
    for start in range(0, n, COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < m)[:, None] & (col < n)[None, :]
        w = weight_at(codes, scale, shift, levels, at, col[None, :], n, k, ROW_BYTES, BITS, BLOCK, mask)
        w = rounded(w, x.dtype.element_ty).to(tl.float32)
        v = tl.load(
            x + (expert * tokens + token)[:, None] * n + col[None, :], mask=(token < tokens)[:, None] & (col < n)[None, :], other=0.0
        )
        acc += w[None, :, :] * v.to(tl.float32)[:, None, :]
    to = out + (expert * tokens + token)[:, None] * m + row[None, :]
    tl.store(to, rounded(tl.sum(acc, 2), out.dtype.element_ty), mask=(token < tokens)[:, None] & (row < m)[None, :])


@triton.jit
def _level(levels, word, high, j: tl.constexpr, BITS: tl.constexpr):
    """Level of code j of a word of eight codes."""
    code = (word >> (j * (BITS & 14))) & (2 ** (BITS & 14) - 1)
    if BITS == 3:
        code |= ((high >> j) & 1) << 2
    return tl.load(levels + code)


@triton.jit
def _two(x, mask, PERMUTE: tl.constexpr):
    """Two neighbouring columns of x, as float32."""
    if x.dtype.element_ty == tl.float32:
        a, b = words(tl.load(x.to(tl.pointer_type(tl.int64)), mask=mask, other=0), PERMUTE)
        return a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)
    else:
        v = tl.load(x.to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        a = (v & 0xFFFF).to(tl.int16).to(x.dtype.element_ty, bitcast=True)
        b = (v >> 16).to(tl.int16).to(x.dtype.element_ty, bitcast=True)
        return a.to(tl.float32), b.to(tl.float32)


# A multiple of 16 bytes a row, once specialised, would give neighbouring units to one lane.
@triton.jit(do_not_specialize=["m", "k", "tokens", "row_bytes"])
def _lanes_units(
    out,
    x,
    codes,
    scale,
    shift,
    levels,
    m,
    k,
    tokens,
    row_bytes,
    n: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    PERMUTE: tl.constexpr,
):
    """As `_lanes`, by words of eight codes; n and BLOCK are multiples of 8. The scale multiplies sums over eight columns."""
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :, None]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[None, None, :]
    start = codes + (expert * m + row) * row_bytes
    acc = tl.zeros((UNITS, ROWS, TOKENS), tl.float32)
    for first in range(0, n // 8, UNITS):
        unit = first + tl.arange(0, UNITS)[:, None, None]
        mask = (row < m) & (unit < n // 8)
        high = 0
        if BITS == 8:
            word = tl.load(start.to(tl.pointer_type(tl.int64)) + unit, mask=mask, other=0)
        elif BITS == 4:
            word = tl.load(start.to(tl.pointer_type(tl.int32)) + unit, mask=mask, other=0)
        else:
            word = tl.load(start.to(tl.pointer_type(tl.int16)) + unit, mask=mask, other=0).to(tl.int32)
            if BITS == 3:
                high = tl.load(start + n // 4 + unit, mask=mask, other=0).to(tl.int32)
        block = (expert * m + row) * k + unit * 8 // BLOCK
        c = tl.load(scale + block, mask=mask, other=0.0).to(tl.float32)
        at = x + (expert * tokens + token) * n + unit * 8
        valid = (token < tokens) & (unit < n // 8)
        part = tl.zeros((UNITS, ROWS, TOKENS), tl.float32)
        total = tl.zeros((UNITS, 1, TOKENS), tl.float32)
        for j in tl.static_range(0, 8, 2):
            a, b = _two(at + j, valid, PERMUTE)
            part += _level(levels, word, high, j, BITS) * a
            part += _level(levels, word, high, j + 1, BITS) * b
            if shift is not None:
                total += a + b
        acc += part * c
        if shift is not None:
            acc += total * tl.load(shift + block, mask=mask, other=0.0)
    to = out + (expert * tokens + token) * m + row
    y = rounded(tl.sum(acc, 0, keep_dims=True), out.dtype.element_ty)
    tl.store(to, y, mask=(token < tokens) & (row < m))


@triton.jit
def _lanes_transposed(
    out,
    x,
    codes,
    scale,
    shift,
    levels,
    m,
    n,
    k,
    tokens,
    SHARE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out (SPLIT, e, tokens, n) = x (e, tokens, m) @ W, SHARE rows a split; programs: columns, splits and tokens, experts."""
    expert = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1) % SPLIT
    token = tl.program_id(1) // SPLIT * TOKENS + tl.arange(0, TOKENS)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    acc = tl.zeros((TOKENS, ROWS, COLS), tl.float32)
    end = tl.minimum(m, (split + 1) * SHARE)
    for start in range(0, SHARE, ROWS):
        row = split * SHARE + start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (col < n)[None, :]
        w = weight_at(codes, scale, shift, levels, (expert * m + row)[:, None], col[None, :], n, k, ROW_BYTES, BITS, BLOCK, mask)
        w = rounded(w, x.dtype.element_ty).to(tl.float32)
        v = tl.load(
            x + (expert * tokens + token)[:, None] * m + row[None, :], mask=(token < tokens)[:, None] & (row < end)[None, :], other=0.0
        )
        acc += w[None, :, :] * v.to(tl.float32)[:, :, None]
    to = out + ((split * tl.num_programs(2) + expert) * tokens + token)[:, None] * n + col[None, :]
    tl.store(to, tl.sum(acc, 1), mask=(token < tokens)[:, None] & (col < n)[None, :])


def by_lanes(out, x, codes, scale, shift, levels, t, e, m, tokens, rows=None, warps=4):
    together = min(4, triton.next_power_of_2(tokens))
    k, size = n_blocks(t.n, t.block), row_bytes(t.n, t.bits)
    if t.block % 8 == 0 and planes_aligned(codes, t.n, t.bits) and x.data_ptr() % 8 == 0:
        rows = rows or 4
        grid = (-(-m // rows), -(-tokens // together), e)
        constants = (t.n, t.bits, t.block, together, rows, 32 * warps, not INTERPRETED)
        tensors = (out, x, codes, scale, shift, levels)
        launch(_lanes_units, grid, tensors, (m, k, tokens, size), constants, num_warps=warps, num_stages=1)
    else:
        rows = rows or 8
        _lanes[(triton.cdiv(m, rows), triton.cdiv(tokens, together), e)](
            out, x, codes, scale, shift, levels, m, k, tokens, t.n, size, t.bits, t.block, together, rows, 256, num_warps=warps
        )


def by_lanes_transposed(out, x, codes, scale, shift, levels, t, e, m, tokens, rows=8, cols=256, split=None):
    together = min(4, triton.next_power_of_2(tokens))
    tiles = triton.cdiv(t.n, cols) * e * triton.cdiv(tokens, together)
    split = split or max(1, min(32, triton.next_power_of_2(1024 // tiles), triton.cdiv(m, 4 * rows)))
    share = triton.cdiv(triton.cdiv(m, split), rows) * rows
    parts = torch.empty(split, *out.shape, dtype=torch.float32, device=out.device)
    _lanes_transposed[(triton.cdiv(t.n, cols), split * triton.cdiv(tokens, together), e)](
        parts,
        x,
        codes,
        scale,
        shift,
        levels,
        m,
        t.n,
        n_blocks(t.n, t.block),
        tokens,
        share,
        row_bytes(t.n, t.bits),
        t.bits,
        t.block,
        together,
        rows,
        cols,
        split,
        num_warps=4,
    )
    folded(out, parts, split)
