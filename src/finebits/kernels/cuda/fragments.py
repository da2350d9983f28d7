"""Products of up to 32 tokens in a half precision on tensor cores, from codes to operands in registers.

    by_fragments               out (e, tokens, m) = x (e, tokens, n) @ Wᵀ
    by_fragments_transposed    out (e, tokens, n) = x (e, tokens, m) @ W

Operands lie where the tensor cores want them, so the permutations below move nothing between lanes. Forward, a warp takes a slice s of the
columns; lane 4·g + t holds, of row (or token) 8·b + g, unit t of each group of 64 columns. Transposed, the product runs over rows: lane
4·g + t holds unit g of 128 columns, of rows 4·t to 4·t + 3 of each sixteen. The bytes of a row must not be specialised to a multiple
of 16: wider loads would give neighbouring units to one lane.

Bytes: codes and scales once, whatever the number of tokens; x comes from the cache, once for 16 rows or 128 columns. Transposed, rows are
split among programs, whose float32 results are written and read again (`folding`).
Instructions a weight at 2, 3, 4 and 8 bits; tensor-core products are 1/8 of one for 8 tokens and 1/2 for 32:

    forward       8 tokens    3.1  4.3  4.4  7.6        32 tokens    5.4  6.7  6.9  10.0
    transposed                4.2  5.4  5.6  7.7                     5.1  6.4  6.5   8.5
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from finebits.blocks import n_blocks, row_bytes
from finebits.kernels.cuda.decode import byte_table, decoded_units, fetch, tree, tree_scaled, unit_of_x
from finebits.kernels.cuda.folding import folded
from finebits.kernels.cuda.language import dot, halves, rounded, words
from finebits.kernels.cuda.launch import INTERPRETED, launch, power


@triton.jit(do_not_specialize=["m", "k", "tokens", "row_bytes"])
def _fragments(
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
    SLICES: tl.constexpr,
    AHEAD: tl.constexpr,
    PERMUTE: tl.constexpr,
):
    """out (e, tokens, m) = x (e, tokens, n) @ Wᵀ; programs: rows, experts. n is a multiple of 64, BLOCK of 16."""
    dtype: tl.constexpr = x.dtype.element_ty
    WHOLE: tl.constexpr = BLOCK % 64 == 0  # one scale a group, applied after the product
    if PERMUTE and BITS < 8:
        table = byte_table(levels, dtype, BITS)
    else:
        table = (0, 0)
    expert = tl.program_id(1).to(tl.int64)
    t = tl.arange(0, 4)[:, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None]
    s = tl.arange(0, SLICES)[None, None, :, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS // 8)[None, None, None, :] * 8 + g
    token = tl.arange(0, TOKENS // 8)[None, None, None, :] * 8 + g
    slices = tl.arange(0, SLICES)[:, None]
    scaled = tl.program_id(0) * ROWS + tl.arange(0, ROWS)

    groups: tl.constexpr = n // 64
    start = codes + (expert * m + row) * row_bytes
    x_start = x.to(tl.pointer_type(tl.int64)) + (expert * tokens + token) * (n // 4) + t * 4
    if WHOLE:
        s_start = (expert * m + scaled)[None, :] * k
    else:
        s_start = (expert * m + row) * k
    acc = tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    ones = tl.full((SLICES, ROWS, 64), 1.0, tl.float32).to(dtype)

    first = s * 2
    v, u = fetch(codes, n, start, first * 4 + t, (row < m) & (first < groups), BITS)
    v2, u2 = fetch(codes, n, start, first * 4 + 4 + t, (row < m) & (first + 1 < groups), BITS)
    for group in tl.range(0, groups, SLICES * 2):
        here = group + s * 2
        if AHEAD:
            later = here + SLICES * 2
            next_v, next_u = fetch(codes, n, start, later * 4 + t, (row < m) & (later < groups), BITS)
            next_v2, next_u2 = fetch(codes, n, start, later * 4 + 4 + t, (row < m) & (later + 1 < groups), BITS)
        elif group > 0:
            v, u = fetch(codes, n, start, here * 4 + t, (row < m) & (here < groups), BITS)
            v2, u2 = fetch(codes, n, start, here * 4 + 4 + t, (row < m) & (here + 1 < groups), BITS)
        if WHOLE:
            slice_group = group + slices * 2
            valid = (scaled < m)[None, :] & (slice_group < groups)
            valid2 = (scaled < m)[None, :] & (slice_group + 1 < groups)
            at = s_start + slice_group * 64 // BLOCK
            at2 = s_start + (slice_group + 1) * 64 // BLOCK
        else:
            valid = (row < m) & (here < groups)
            valid2 = (row < m) & (here + 1 < groups)
            at = s_start + (here * 64 + t * 16) // BLOCK
            at2 = s_start + (here * 64 + 64 + t * 16) // BLOCK
        c = tl.load(scale + at, mask=valid, other=0.0).to(tl.float32)
        c2 = tl.load(scale + at2, mask=valid2, other=0.0).to(tl.float32)
        f = None
        f2 = None
        if shift is not None:
            f = tl.load(shift + at, mask=valid, other=0.0)
            f2 = tl.load(shift + at2, mask=valid2, other=0.0)
        y = unit_of_x(x_start + here * 16, (token < tokens) & (here < groups), dtype, PERMUTE)
        y2 = unit_of_x(x_start + here * 16 + 16, (token < tokens) & (here + 1 < groups), dtype, PERMUTE)
        if BITS == 3:
            y = tl.permute(y, (2, 5, 4, 0, 7, 6, 3, 1))
            y2 = tl.permute(y2, (2, 5, 4, 0, 7, 6, 3, 1))
        elif BITS == 2:
            y = tl.permute(y, (2, 4, 7, 0, 6, 5, 3, 1))
            y2 = tl.permute(y2, (2, 4, 7, 0, 6, 5, 3, 1))
        else:
            y = tl.permute(y, (2, 7, 6, 0, 5, 4, 3, 1))
            y2 = tl.permute(y2, (2, 7, 6, 0, 5, 4, 3, 1))
        y = tl.reshape(y, (SLICES, 64, TOKENS))
        y2 = tl.reshape(y2, (SLICES, 64, TOKENS))
        p, p2 = decoded_units(v, u, v2, u2, levels, table, dtype, BITS, PERMUTE)
        if WHOLE:
            w = tl.permute(tree(*p, dtype), (2, 3, 1, 7, 6, 0, 5, 4))
            w2 = tl.permute(tree(*p2, dtype), (2, 3, 1, 7, 6, 0, 5, 4))
        else:
            w = tl.permute(rounded(tree_scaled(*p, c, f, dtype), dtype), (2, 3, 1, 6, 5, 0, 4, 7))
            w2 = tl.permute(rounded(tree_scaled(*p2, c2, f2, dtype), dtype), (2, 3, 1, 6, 5, 0, 4, 7))
        w = tl.reshape(w, (SLICES, ROWS, 64))
        w2 = tl.reshape(w2, (SLICES, ROWS, 64))
        if WHOLE:
            acc += dot(w, y) * c[:, :, None]
            acc += dot(w2, y2) * c2[:, :, None]
            if shift is not None:
                acc += dot(ones, y) * f[:, :, None]
                acc += dot(ones, y2) * f2[:, :, None]
        else:
            acc += dot(w, y)
            acc += dot(w2, y2)
        if AHEAD:
            v, u, v2, u2 = next_v, next_u, next_v2, next_u2
    column = tl.arange(0, TOKENS)
    to = out + (expert * tokens + column)[None, :] * m + scaled[:, None]
    tl.store(to, rounded(tl.sum(acc, 0), dtype), mask=(column < tokens)[None, :] & (scaled < m)[:, None])


@triton.jit
def _hidden(v, PERMUTE: tl.constexpr):
    """v, without what the compiler knows of it: contiguous addresses would be dealt to lanes in their own order."""
    if PERMUTE:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return v


@triton.jit
def _natural(w, BITS: tl.constexpr):
    """(t, g, s, b, p0, p1, p2, r, odd) -> (s, i3, i2, i1, i0, g, b, t, odd): columns, then rows, in their order."""
    if BITS == 3:
        return tl.permute(w, (2, 4, 7, 6, 5, 1, 0, 3, 8))
    elif BITS == 2:
        return tl.permute(w, (2, 5, 4, 7, 6, 1, 0, 3, 8))
    else:
        return tl.permute(w, (2, 6, 5, 4, 7, 1, 0, 3, 8))


@triton.jit(do_not_specialize=["m", "k", "tokens", "row_bytes"])
def _fragments_transposed(
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
    SHARE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
    PERMUTE: tl.constexpr,
):
    """out (splits, e, tokens, n) = x (e, tokens, m) @ W, SHARE rows a split; programs: columns, splits, experts.

    n and BLOCK are multiples of 16, m of 4.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    if PERMUTE and BITS < 8:
        table = byte_table(levels, dtype, BITS)
    else:
        table = (0, 0)
    expert = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    t = tl.arange(0, 4)[:, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None]
    s = tl.arange(0, SLICES)[None, None, :, None]
    b = tl.arange(0, 2)[None, None, None, :]
    token = tl.arange(0, TOKENS // 8)[None, None, None, :] * 8 + g
    unit = tl.program_id(0) * 8 + _hidden(g, PERMUTE)
    inside = unit < n // 16
    block = unit * 16 // BLOCK
    end = tl.minimum(m, (split + 1) * SHARE)
    acc = tl.zeros((SLICES, 128, TOKENS), tl.float32)
    for start in range(0, SHARE, SLICES * 16):
        quad = split * SHARE + start + s * 16 + t * 4
        row = quad + b * 2
        mask = inside & (row < end)
        base = expert * m + row
        v, u = fetch(codes, n, codes + base * row_bytes, unit, mask, BITS)
        v2, u2 = fetch(codes, n, codes + (base + 1) * row_bytes, unit, mask, BITS)
        c = tl.load(scale + base * k + block, mask=mask, other=0.0).to(tl.float32)
        c2 = tl.load(scale + (base + 1) * k + block, mask=mask, other=0.0).to(tl.float32)
        f = None
        f2 = None
        if shift is not None:
            f = tl.load(shift + base * k + block, mask=mask, other=0.0)
            f2 = tl.load(shift + (base + 1) * k + block, mask=mask, other=0.0)
        at = x.to(tl.pointer_type(tl.int64)) + ((expert * tokens + token) * m + quad) // 4
        low, high = words(tl.load(at, mask=(token < tokens) & (quad < end), other=0), PERMUTE)
        y = tl.join(halves(low, dtype), halves(high, dtype))  # (t, g, s, tokens / 8, r0, r1)
        y = tl.reshape(tl.permute(y, (2, 0, 5, 4, 3, 1)), (SLICES, 16, TOKENS))
        p, p2 = decoded_units(v, u, v2, u2, levels, table, dtype, BITS, PERMUTE)
        w = rounded(tl.join(tree_scaled(*p, c, f, dtype), tree_scaled(*p2, c2, f2, dtype)), dtype)
        w = tl.reshape(_natural(w, BITS), (SLICES, 128, 16))
        acc += dot(w, y)
    place = tl.arange(0, 128)
    col = tl.program_id(0) * 128 + place % 8 * 16 + place // 8
    column = tl.arange(0, TOKENS)
    to = out + ((split * tl.num_programs(2) + expert) * tokens + column)[None, :] * n + col[:, None]
    tl.store(to, tl.sum(acc, 0), mask=(column < tokens)[None, :] & (col < n)[:, None])


def by_fragments(out, x, codes, scale, shift, levels, t, e, m, tokens, rows=16, slices=8, ahead=True):
    constants = (t.n, t.bits, t.block, _padded(tokens), rows, slices, ahead, not INTERPRETED)
    numbers = (m, n_blocks(t.n, t.block), tokens, row_bytes(t.n, t.bits))
    tensors = (out, x, codes, scale, shift, levels)
    launch(_fragments, (-(-m // rows), e, 1), tensors, numbers, constants, num_warps=slices, num_stages=1)


def by_fragments_transposed(out, x, codes, scale, shift, levels, t, e, m, tokens, slices=4, split=None):
    padded, tiles = _padded(tokens), -(-t.n // 128) * e
    split = split or max(1, min(32, power(-(-256 // tiles)), -(-m // (16 * slices))))
    share = -(-m // (split * 16 * slices)) * 16 * slices
    parts = torch.empty(split, *out.shape, dtype=torch.float32, device=out.device)
    constants = (t.n, share, t.bits, t.block, padded, slices, not INTERPRETED)
    numbers = (m, n_blocks(t.n, t.block), tokens, row_bytes(t.n, t.bits))
    tensors = (parts, x, codes, scale, shift, levels)
    launch(_fragments_transposed, (-(-t.n // 128), split, e), tensors, numbers, constants, num_warps=slices, num_stages=1)
    folded(out, parts, split)


def _padded(tokens: int) -> int:
    return max(8, power(tokens))
