"""Reading codes and weights of packed rows, one by one or eight at a time.

A row is its planes one after the other (finebits.blocks): bits 0 to 1 of every code, then bit 2, for 3 bits; a single plane for 2, 4 and 8.

    code_at, weight_at    one code, from the byte that holds it: any n, any alignment; for 3 bits two bytes
    eight_codes           eight columns are one word of each plane (2, 4 or 8 bytes; 2 + 1 for 3 bits): n % 8 == 0, aligned planes

Bytes: codes once from memory; levels and scales come from the cache. Instructions: one by one a load, a shift and a mask (twice for 3
bits), and the loads of level and scale; eight at a time the load of codes is shared by eight.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from finebits.blocks import row_bytes, widths


@triton.jit
def code_at(row, col, n, BITS: tl.constexpr, mask):
    """Codes at columns `col` of the rows that start at pointers `row`, each read on its own: any n, any alignment."""
    code = tl.zeros(col.shape, tl.int32)
    at = 0
    low: tl.constexpr = BITS & 7
    if BITS == 8:
        code += tl.load(row + col, mask=mask, other=0).to(tl.int32)
    if low & 4:
        byte = tl.load(row + col // 2, mask=mask, other=0).to(tl.int32)
        code += (byte >> (col % 2 * 4)) & 15
        at += (n + 1) // 2
    if low & 2:
        byte = tl.load(row + at + col // 4, mask=mask, other=0).to(tl.int32)
        code += ((byte >> (col % 4 * 2)) & 3) << (BITS & 4)
        at += (n + 3) // 4
    if low & 1:
        byte = tl.load(row + at + col // 8, mask=mask, other=0).to(tl.int32)
        code += ((byte >> (col % 8)) & 1) << (BITS & 6)
    return code


@triton.jit
def weight_at(codes, scale, shift, levels, row, col, n, k, ROW_BYTES: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, mask):
    """float32 weights at (row, col), which broadcast against each other."""
    code = code_at(codes + row * ROW_BYTES, col + tl.zeros_like(row).to(tl.int32), n, BITS, mask)
    block = row * k + col // BLOCK
    w = tl.load(levels + code) * tl.load(scale + block, mask=mask, other=0.0).to(tl.float32)
    if shift is not None:
        w += tl.load(shift + block, mask=mask, other=0.0)
    return w


@triton.jit
def eight_codes(start, unit, per_row, mask, j, BITS: tl.constexpr):
    """Codes of eight columns, along a new last dimension j, in one word (two for 3 bits) a row that starts at `start`."""
    if BITS == 3:
        low = tl.load(start.to(tl.pointer_type(tl.int16)) + unit, mask=mask, other=0).to(tl.int32)
        high = tl.load(start + per_row * 2 + unit, mask=mask, other=0).to(tl.int32)
        low, high = tl.expand_dims(low, -1), tl.expand_dims(high, -1)
        return ((low >> (j * 2)) & 3) | (((high >> j) & 1) << 2)
    elif BITS == 8:
        word = tl.load(start.to(tl.pointer_type(tl.int64)) + unit, mask=mask, other=0)
        return ((tl.expand_dims(word, -1) >> (j * 8)) & 255).to(tl.int32)
    elif BITS == 4:
        word = tl.load(start.to(tl.pointer_type(tl.int32)) + unit, mask=mask, other=0)
        return (tl.expand_dims(word, -1) >> (j * 4)) & 15
    else:
        word = tl.load(start.to(tl.pointer_type(tl.int16)) + unit, mask=mask, other=0).to(tl.int32)
        return (tl.expand_dims(word, -1) >> (j * 2)) & 3


def planes_aligned(codes: Tensor, n: int, bits: int) -> bool:
    """Whether every eight columns of a plane start on a whole word of their own size."""
    return codes.data_ptr() % 8 == 0 and _planes_divide(n, bits)


@functools.cache
def _planes_divide(n: int, bits: int) -> bool:
    if n % 8:
        return False
    start, row = 0, row_bytes(n, bits)
    for w in widths(bits):
        if start % w or row % w:
            return False
        start += n * w // 8
    return True
