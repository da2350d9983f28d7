"""Triton bodies of the kernel jobs, for NVIDIA GPUs from compute capability 8.0.

`quantize` and `dequantize` agree with the reference to the bit. `linear` takes one of three ways, by the number of tokens and the shape:

- *fragments* (up to 32 tokens in a half precision; n a multiple of 64, blocks of 16): codes go from memory to tensor-core operands
  inside registers. Levels are rounded to x.dtype, products and sums are float32. Where blocks are multiples of 64 and the product is
  not transposed, the scale multiplies the float32 sum of a block; elsewhere it multiplies each weight before the product.
- *lanes* (up to 8 tokens, any block, any dtype): levels and x multiply in float32; where a word holds codes of two blocks, or the
  product is transposed, each weight is first decoded to what `dequantize` gives.
- *dense* (everything else): `dequantize`, then the matrix product of the library.

Sums over splits of a row are taken in a fixed order: the same call on the same machine gives the same bits.

A step of training makes a thousand short launches, so what a launch costs the host counts: kernels that are compiled already are called
without Triton's look at every argument.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finebits.blocks import n_blocks, row_bytes, widths
from finebits.errors import Invalid
from finebits.kernels.table import Rounding, Table

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

name = "cuda"
STORES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# More tokens than these go the dense way.
FRAGMENT_TOKENS = 32
LANE_TOKENS = 8


@functools.cache
def available() -> str | None:
    if triton is None:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None:
        return "only NVIDIA devices are supported"
    if min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return None


def supports(job: str, device: torch.device, bits: int) -> bool:
    return job not in ("successive", "search") and bits in (2, 3, 4, 8) and (device.type == "cuda" or INTERPRETED)


_HERE = contextlib.nullcontext()


def _on(device: torch.device):
    """Triton launches on the current device, so tensors of another one must make theirs current."""
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(device)


_compiled: dict[tuple, Any] = {}


def _launch(kernel: Any, grid: tuple[int, int, int], tensors: tuple, numbers: tuple[int, ...], constants: tuple, **options: Any) -> None:
    """kernel[grid](*tensors, *numbers, *constants, **options), where the options follow from the constants.

    What Triton compiles for depends on the device, types, numbers, and which pointers are multiples of 16. A kernel is kept for the case
    that all of them are, and then run as Triton itself would after its look at the arguments.
    """
    device, places, kinds, pointers = tensors[0].get_device(), 0, [], []
    for t in tensors:
        if t is None:
            kinds.append(None)
            pointers.append(None)
        else:
            at = t.data_ptr()
            places |= at
            kinds.append(t.dtype)
            pointers.append(at)
    if device < 0 or places % 16:
        kernel[grid](*tensors, *numbers, *constants, **options)
        return
    key = (id(kernel), device, *kinds, numbers, constants)
    found = _compiled.get(key)
    if found is None:
        _compiled[key] = kernel[grid](*tensors, *numbers, *constants, **options)
    else:
        stream = torch._C._cuda_getCurrentRawStream(device)
        found.run(*grid, stream, found.function, found.packed_metadata, None, None, None, *pointers, *numbers, *constants)


if triton is not None:
    # The interpreter's cast from float32 to bfloat16 does not round to nearest even; compiled code does.
    _BY_HAND = tl.constexpr(INTERPRETED)

    @triton.jit
    def _to(v, dtype: tl.constexpr):
        """v.to(dtype), rounded to nearest even."""
        if _BY_HAND and dtype == tl.bfloat16 and v.dtype == tl.float32:
            bits = v.to(tl.uint32, bitcast=True)
            bits = tl.where(v == v, bits + 0x7FFF + ((bits >> 16) & 1), bits)
            return (bits >> 16).to(tl.uint16).to(dtype, bitcast=True)
        else:
            return v.to(dtype)

    @triton.jit
    def _dot(a, b):
        if _BY_HAND:  # the interpreter multiplies the bits of bfloat16 as integers
            return tl.dot(a.to(tl.float32), b.to(tl.float32))
        else:
            return tl.dot(a, b)

    @triton.jit
    def _code(row, col, n, BITS: tl.constexpr, mask):
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
    def _weight(codes, scale, shift, levels, row, col, n, k, ROW_BYTES: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, mask):
        """float32 weights at (row, col), which broadcast against each other."""
        code = _code(codes + row * ROW_BYTES, col + tl.zeros_like(row).to(tl.int32), n, BITS, mask)
        block = row * k + col // BLOCK
        w = tl.load(levels + code) * tl.load(scale + block, mask=mask, other=0.0).to(tl.float32)
        if shift is not None:
            w += tl.load(shift + block, mask=mask, other=0.0)
        return w

    @triton.jit
    def _dequantize_any(
        out, codes, scale, shift, levels, n, k, ROW_BYTES: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
    ):
        row = tl.full((TILE,), 0, tl.int64) + tl.program_id(0)
        col = tl.program_id(1) * TILE + tl.arange(0, TILE)
        mask = col < n
        w = _weight(codes, scale, shift, levels, row, col, n, k, ROW_BYTES, BITS, BLOCK, mask)
        tl.store(out + row * n + col, _to(w, out.dtype.element_ty), mask=mask)

    @triton.jit
    def _eight_codes(start, unit, per_row, mask, j, BITS: tl.constexpr):
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
        code = _eight_codes(codes + row.to(tl.int64) * ROW_BYTES, part, per_row, mask, j, BITS)
        block = row.to(tl.int64) * k + part * 8 // BLOCK
        w = tl.load(levels + code) * tl.load(scale + block, mask=mask, other=0.0).to(tl.float32)[:, None]
        if shift is not None:
            w += tl.load(shift + block, mask=mask, other=0.0)[:, None]
        tl.store(out + unit.to(tl.int64)[:, None] * 8 + j, _to(w, out.dtype.element_ty), mask=mask[:, None])

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
        return _to(tl.div_rn(high - low, tl.zeros_like(high) + peak), scale_type), _to(low, scale_type)

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
        tl.store(scale + block, _to(tl.div_rn(span - floor, peak + tl.zeros_like(span)), scale.dtype.element_ty))
        if MINMAX:
            tl.store(shift + block, _to(floor, shift.dtype.element_ty))

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
            w = _weight(codes, scale, shift, levels, at, col[None, :], n, k, ROW_BYTES, BITS, BLOCK, mask)
            w = _to(w, x.dtype.element_ty).to(tl.float32)
            v = tl.load(
                x + (expert * tokens + token)[:, None] * n + col[None, :], mask=(token < tokens)[:, None] & (col < n)[None, :], other=0.0
            )
            acc += w[None, :, :] * v.to(tl.float32)[:, None, :]
        to = out + (expert * tokens + token)[:, None] * m + row[None, :]
        tl.store(to, _to(tl.sum(acc, 2), out.dtype.element_ty), mask=(token < tokens)[:, None] & (row < m)[None, :])

    @triton.jit
    def _words(v, PERMUTE: tl.constexpr):
        """The halves of a 64-bit word. The compiler splits registers for nothing, but shifts by 16 + 32 when it sees the shift."""
        if PERMUTE:
            return tl.inline_asm_elementwise("mov.b64 {$0, $1}, $2;", "=r,=r,l", [v], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
        else:
            return v.to(tl.int32), (v >> 32).to(tl.int32)

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
            a, b = _words(tl.load(x.to(tl.pointer_type(tl.int64)), mask=mask, other=0), PERMUTE)
            return a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)
        else:
            v = tl.load(x.to(tl.pointer_type(tl.int32)), mask=mask, other=0)
            a = (v & 0xFFFF).to(tl.int16).to(x.dtype.element_ty, bitcast=True)
            b = (v >> 16).to(tl.int16).to(x.dtype.element_ty, bitcast=True)
            return a.to(tl.float32), b.to(tl.float32)

    # Dimensions: units, rows, tokens. A lane holds one unit of every row: nothing moves between lanes until the end. As below, the
    # bytes of a row must not be specialised to a multiple of 16.

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
            some = (token < tokens) & (unit < n // 8)
            part = tl.zeros((UNITS, ROWS, TOKENS), tl.float32)
            total = tl.zeros((UNITS, 1, TOKENS), tl.float32)
            for j in tl.static_range(0, 8, 2):
                a, b = _two(at + j, some, PERMUTE)
                part += _level(levels, word, high, j, BITS) * a
                part += _level(levels, word, high, j + 1, BITS) * b
                if shift is not None:
                    total += a + b
            acc += part * c
            if shift is not None:
                acc += total * tl.load(shift + block, mask=mask, other=0.0)
        to = out + (expert * tokens + token) * m + row
        y = _to(tl.sum(acc, 0, keep_dims=True), out.dtype.element_ty)
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
            w = _weight(codes, scale, shift, levels, (expert * m + row)[:, None], col[None, :], n, k, ROW_BYTES, BITS, BLOCK, mask)
            w = _to(w, x.dtype.element_ty).to(tl.float32)
            v = tl.load(
                x + (expert * tokens + token)[:, None] * m + row[None, :], mask=(token < tokens)[:, None] & (row < end)[None, :], other=0.0
            )
            acc += w[None, :, :] * v.to(tl.float32)[:, :, None]
        to = out + ((split * tl.num_programs(2) + expert) * tokens + token)[:, None] * n + col[None, :]
        tl.store(to, tl.sum(acc, 1), mask=(token < tokens)[:, None] & (col < n)[None, :])

    @triton.jit
    def _fold(out, parts, size, SPLIT: tl.constexpr, TILE: tl.constexpr):
        """Sum of SPLIT partial results, in order."""
        at = tl.program_id(0) * TILE + tl.arange(0, TILE)
        acc = tl.zeros((TILE,), tl.float32)
        for split in tl.static_range(SPLIT):
            acc += tl.load(parts + split * size + at, mask=at < size, other=0.0)
        tl.store(out + at, _to(acc, out.dtype.element_ty), mask=at < size)

    # The fragment kernels. Sixteen codes of one row (a unit) become eight registers of two levels each, numbered p = 4·p2 + 2·p1 + p0;
    # r picks the level inside the register. Which column 8·i3 + 4·i2 + 2·i1 + i0 of the unit sits where is the decoder's choice:
    #   4 and 8 bits: p2 p1 p0 r = i3 i2 i1 i0      3 bits: i1 i0 i3 i2      2 bits: i0 i3 i2 i1
    # and x is loaded in the same order. Tables hold the levels' low bytes and high bytes apart, four to a word, for `prmt`,
    # which picks four bytes out of eight by the nibbles of a selector.

    _DECODE_4 = tl.constexpr("""
    {
    .reg .b32 s, m, a, b, lo, hi;
    and.b32 s, $4, 0x77777777;
    shr.u32 m, $4, 1;
    lop3.b32 m, m, 0x44444444, 0x32103210, 0xea;
    prmt.b32 a, $5, $6, s;
    prmt.b32 b, $7, $8, s;
    prmt.b32 lo, a, b, m;
    prmt.b32 a, $9, $10, s;
    prmt.b32 b, $11, $12, s;
    prmt.b32 hi, a, b, m;
    prmt.b32 $0, lo, hi, 0x5140;
    prmt.b32 $1, lo, hi, 0x7362;
    shr.u32 s, s, 16;
    shr.u32 m, m, 16;
    prmt.b32 a, $5, $6, s;
    prmt.b32 b, $7, $8, s;
    prmt.b32 lo, a, b, m;
    prmt.b32 a, $9, $10, s;
    prmt.b32 b, $11, $12, s;
    prmt.b32 hi, a, b, m;
    prmt.b32 $2, lo, hi, 0x5140;
    prmt.b32 $3, lo, hi, 0x7362;
    }
    """)

    # One selector of eight 3-bit codes, from two units: even nibbles belong to the first, odd ones to the second.
    _DECODE_3 = tl.constexpr("""
    {
    .reg .b32 s, lo, hi;
    prmt.b32 lo, $5, $6, $4;
    prmt.b32 hi, $7, $8, $4;
    prmt.b32 $0, lo, hi, 0x6240;
    prmt.b32 $2, lo, hi, 0x7351;
    shr.u32 s, $4, 16;
    prmt.b32 lo, $5, $6, s;
    prmt.b32 hi, $7, $8, s;
    prmt.b32 $1, lo, hi, 0x6240;
    prmt.b32 $3, lo, hi, 0x7351;
    }
    """)

    _DECODE_2 = tl.constexpr("""
    {
    .reg .b32 s, lo, hi;
    prmt.b32 lo, $5, $5, $4;
    prmt.b32 hi, $6, $6, $4;
    prmt.b32 $0, lo, hi, 0x5140;
    prmt.b32 $1, lo, hi, 0x7362;
    shr.u32 s, $4, 16;
    prmt.b32 lo, $5, $5, s;
    prmt.b32 hi, $6, $6, s;
    prmt.b32 $2, lo, hi, 0x5140;
    prmt.b32 $3, lo, hi, 0x7362;
    }
    """)

    @triton.jit
    def _pattern(levels, i, dtype: tl.constexpr):
        """Bits of a level in a 2-byte dtype."""
        return _to(tl.load(levels + i), dtype).to(tl.uint16, bitcast=True).to(tl.uint32)

    @triton.jit
    def _quad(levels, i, dtype: tl.constexpr):
        """Low bytes and high bytes of four levels."""
        a = _pattern(levels, i, dtype)
        b = _pattern(levels, i + 1, dtype)
        c = _pattern(levels, i + 2, dtype)
        d = _pattern(levels, i + 3, dtype)
        low = (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | (d << 24)
        high = (a >> 8) | ((b >> 8) << 8) | ((c >> 8) << 16) | ((d >> 8) << 24)
        return low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)

    @triton.jit
    def _pair(levels, a, b, dtype: tl.constexpr):
        """What a decoder's output register holds, by look-up."""
        pair = _pattern(levels, a, dtype) | (_pattern(levels, b, dtype) << 16)
        return pair.to(tl.int32, bitcast=True)

    @triton.jit
    def _eight(s, levels, dtype: tl.constexpr, i: tl.constexpr, j: tl.constexpr):
        """Levels of the codes in nibbles i and j of the selector."""
        return _pair(levels, (s >> (4 * i)) & 15, (s >> (4 * j)) & 15, dtype)

    @triton.jit
    def _decode_4(v, levels, table, dtype: tl.constexpr, PERMUTE: tl.constexpr):
        if PERMUTE:
            l0, l1, l2, l3, h0, h1, h2, h3 = table
            return tl.inline_asm_elementwise(
                _DECODE_4,
                "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
                [v, l0, l1, l2, l3, h0, h1, h2, h3],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            return (
                _eight(v, levels, dtype, 0, 1),
                _eight(v, levels, dtype, 2, 3),
                _eight(v, levels, dtype, 4, 5),
                _eight(v, levels, dtype, 6, 7),
            )

    @triton.jit
    def _decode_3(s, levels, table, dtype: tl.constexpr, PERMUTE: tl.constexpr):
        if PERMUTE:
            l0, l1, h0, h1 = table
            return tl.inline_asm_elementwise(
                _DECODE_3,
                "=&r,=&r,=&r,=&r,r,r,r,r,r",
                [s, l0, l1, h0, h1],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            return (
                _eight(s, levels, dtype, 0, 2),
                _eight(s, levels, dtype, 4, 6),
                _eight(s, levels, dtype, 1, 3),
                _eight(s, levels, dtype, 5, 7),
            )

    @triton.jit
    def _decode_2(s, levels, table, dtype: tl.constexpr, PERMUTE: tl.constexpr):
        if PERMUTE:
            l0, h0 = table
            return tl.inline_asm_elementwise(
                _DECODE_2,
                "=&r,=&r,=&r,=&r,r,r,r",
                [s, l0, h0],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            return (
                _eight(s, levels, dtype, 0, 1),
                _eight(s, levels, dtype, 2, 3),
                _eight(s, levels, dtype, 4, 5),
                _eight(s, levels, dtype, 6, 7),
            )

    @triton.jit
    def _table(levels, dtype: tl.constexpr, BITS: tl.constexpr):
        l0, h0 = _quad(levels, 0, dtype)
        if BITS == 2:
            return l0, h0
        else:
            l1, h1 = _quad(levels, 4, dtype)
            if BITS == 3:
                return l0, l1, h0, h1
            else:
                l2, h2 = _quad(levels, 8, dtype)
                l3, h3 = _quad(levels, 12, dtype)
                return l0, l1, l2, l3, h0, h1, h2, h3

    @triton.jit
    def _halves(v, dtype: tl.constexpr):
        low = (v & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        high = (v >> 16).to(tl.int16).to(dtype, bitcast=True)
        return tl.join(low, high)

    @triton.jit
    def _tree(p0, p1, p2, p3, p4, p5, p6, p7, dtype: tl.constexpr):
        """Eight registers -> four new last dimensions (r, p0, p1, p2)."""
        low = tl.join(tl.join(_halves(p0, dtype), _halves(p1, dtype)), tl.join(_halves(p2, dtype), _halves(p3, dtype)))
        high = tl.join(tl.join(_halves(p4, dtype), _halves(p5, dtype)), tl.join(_halves(p6, dtype), _halves(p7, dtype)))
        return tl.join(low, high)

    @triton.jit
    def _floats(v, c, f, dtype: tl.constexpr):
        """Both levels of a register as float32 weights: times the scale, plus the shift."""
        low = (v & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32) * c
        high = (v >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32) * c
        if f is not None:
            low += f
            high += f
        return low, high

    @triton.jit
    def _tree_scaled(p0, p1, p2, p3, p4, p5, p6, p7, c, f, dtype: tl.constexpr):
        """As `_tree`, of float32 weights, with r the last dimension: (p0, p1, p2, r)."""
        l0, h0 = _floats(p0, c, f, dtype)
        l1, h1 = _floats(p1, c, f, dtype)
        l2, h2 = _floats(p2, c, f, dtype)
        l3, h3 = _floats(p3, c, f, dtype)
        l4, h4 = _floats(p4, c, f, dtype)
        l5, h5 = _floats(p5, c, f, dtype)
        l6, h6 = _floats(p6, c, f, dtype)
        l7, h7 = _floats(p7, c, f, dtype)
        low = tl.join(tl.join(tl.join(l0, l1), tl.join(l2, l3)), tl.join(tl.join(l4, l5), tl.join(l6, l7)))
        high = tl.join(tl.join(tl.join(h0, h1), tl.join(h2, h3)), tl.join(tl.join(h4, h5), tl.join(h6, h7)))
        return tl.join(low, high)

    @triton.jit
    def _fetch(codes, n, row, unit, mask, BITS: tl.constexpr):
        """Two words with the codes of a unit; `row` are pointers to the starts of rows."""
        if BITS == 8:
            at = row.to(tl.pointer_type(tl.int64)) + unit * 2
            v = tl.load(at, mask=mask, other=0, eviction_policy="evict_first")
            u = tl.load(at + 1, mask=mask, other=0, eviction_policy="evict_first")
        elif BITS == 4:
            v = tl.load(row.to(tl.pointer_type(tl.int64)) + unit, mask=mask, other=0, eviction_policy="evict_first")
            u = v
        elif BITS == 3:
            v = tl.load(row.to(tl.pointer_type(tl.int32)) + unit, mask=mask, other=0, eviction_policy="evict_first")
            u = tl.load((row + n // 4).to(tl.pointer_type(tl.int16)) + unit, mask=mask, other=0, eviction_policy="evict_first")
        else:
            v = tl.load(row.to(tl.pointer_type(tl.int32)) + unit, mask=mask, other=0, eviction_policy="evict_first")
            u = v
        return v, u

    @triton.jit
    def _unit(v, u, levels, table, dtype: tl.constexpr, BITS: tl.constexpr, PERMUTE: tl.constexpr):
        """The eight registers of one unit of 2, 4 or 8 bits."""
        if BITS == 4:
            low, high = _words(v, PERMUTE)
            a, b, c, d = _decode_4(low, levels, table, dtype, PERMUTE)
            e, f, g, h = _decode_4(high, levels, table, dtype, PERMUTE)
        elif BITS == 2:
            a, b, c, d = _decode_2(v & 0x33333333, levels, table, dtype, PERMUTE)
            e, f, g, h = _decode_2((v >> 2) & 0x33333333, levels, table, dtype, PERMUTE)
        else:
            a = _pair(levels, v & 255, (v >> 8) & 255, dtype)
            b = _pair(levels, (v >> 16) & 255, (v >> 24) & 255, dtype)
            c = _pair(levels, (v >> 32) & 255, (v >> 40) & 255, dtype)
            d = _pair(levels, (v >> 48) & 255, (v >> 56) & 255, dtype)
            e = _pair(levels, u & 255, (u >> 8) & 255, dtype)
            f = _pair(levels, (u >> 16) & 255, (u >> 24) & 255, dtype)
            g = _pair(levels, (u >> 32) & 255, (u >> 40) & 255, dtype)
            h = _pair(levels, (u >> 48) & 255, (u >> 56) & 255, dtype)
        return a, b, c, d, e, f, g, h

    @triton.jit
    def _units_3(v, u, v2, u2, levels, table, dtype: tl.constexpr, PERMUTE: tl.constexpr):
        """The registers of two units of 3 bits: their nibbles are interleaved, so that a selector serves both."""
        low = (v & 0x0F0F0F0F) | ((v2 & 0x0F0F0F0F) << 4)
        high = ((v >> 4) & 0x0F0F0F0F) | (v2 & -0x0F0F0F10)
        # Nibbles of the high plane: A0 A1 A2 A3 and B0 B1 B2 B3 -> A0 B0 A1 B1 A2 B2 A3 B3.
        a = u.to(tl.int32) & 0xFFFF
        b = u2.to(tl.int32) & 0xFFFF
        a = (a | (a << 8)) & 0x00FF00FF
        b = (b | (b << 8)) & 0x00FF00FF
        top = ((a | (a << 4)) & 0x0F0F0F0F) | (((b | (b << 4)) & 0x0F0F0F0F) << 4)
        s0 = (low & 0x33333333) | ((top << 2) & 0x44444444)
        s1 = ((low >> 2) & 0x33333333) | ((top << 1) & 0x44444444)
        s2 = (high & 0x33333333) | (top & 0x44444444)
        s3 = ((high >> 2) & 0x33333333) | ((top >> 1) & 0x44444444)
        a0, a1, b0, b1 = _decode_3(s0, levels, table, dtype, PERMUTE)
        a2, a3, b2, b3 = _decode_3(s1, levels, table, dtype, PERMUTE)
        a4, a5, b4, b5 = _decode_3(s2, levels, table, dtype, PERMUTE)
        a6, a7, b6, b7 = _decode_3(s3, levels, table, dtype, PERMUTE)
        return (a0, a1, a2, a3, a4, a5, a6, a7), (b0, b1, b2, b3, b4, b5, b6, b7)

    @triton.jit
    def _units(v, u, v2, u2, levels, table, dtype: tl.constexpr, BITS: tl.constexpr, PERMUTE: tl.constexpr):
        """The registers of two units."""
        if BITS == 3:
            return _units_3(v, u, v2, u2, levels, table, dtype, PERMUTE)
        else:
            return _unit(v, u, levels, table, dtype, BITS, PERMUTE), _unit(v2, u2, levels, table, dtype, BITS, PERMUTE)

    @triton.jit
    def _unit_x(x, mask, dtype: tl.constexpr, PERMUTE: tl.constexpr):
        """Sixteen columns of x at 8-byte pointers `x`: the dimensions of `x`, then i0, i1, i2, i3."""
        a, b = _words(tl.load(x, mask=mask, other=0), PERMUTE)
        c, d = _words(tl.load(x + 1, mask=mask, other=0), PERMUTE)
        e, f = _words(tl.load(x + 2, mask=mask, other=0), PERMUTE)
        g, h = _words(tl.load(x + 3, mask=mask, other=0), PERMUTE)
        return _tree(a, b, c, d, e, f, g, h, dtype)

    # Shapes of the operands: a warp takes a slice s of the columns; lane 4·g + t holds, of row (or token) 8·b + g, unit t of each group
    # of 64 columns. This is where the tensor cores want them, so the permutations below move nothing between lanes. The bytes of a
    # row must not be specialised to a multiple of 16: wider loads would give neighbouring units to one lane.

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
            table = _table(levels, dtype, BITS)
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
        v, u = _fetch(codes, n, start, first * 4 + t, (row < m) & (first < groups), BITS)
        v2, u2 = _fetch(codes, n, start, first * 4 + 4 + t, (row < m) & (first + 1 < groups), BITS)
        for group in tl.range(0, groups, SLICES * 2):
            here = group + s * 2
            if AHEAD:
                later = here + SLICES * 2
                next_v, next_u = _fetch(codes, n, start, later * 4 + t, (row < m) & (later < groups), BITS)
                next_v2, next_u2 = _fetch(codes, n, start, later * 4 + 4 + t, (row < m) & (later + 1 < groups), BITS)
            elif group > 0:
                v, u = _fetch(codes, n, start, here * 4 + t, (row < m) & (here < groups), BITS)
                v2, u2 = _fetch(codes, n, start, here * 4 + 4 + t, (row < m) & (here + 1 < groups), BITS)
            if WHOLE:
                which = group + slices * 2
                some = (scaled < m)[None, :] & (which < groups)
                more = (scaled < m)[None, :] & (which + 1 < groups)
                at = s_start + which * 64 // BLOCK
                at2 = s_start + (which + 1) * 64 // BLOCK
            else:
                some = (row < m) & (here < groups)
                more = (row < m) & (here + 1 < groups)
                at = s_start + (here * 64 + t * 16) // BLOCK
                at2 = s_start + (here * 64 + 64 + t * 16) // BLOCK
            c = tl.load(scale + at, mask=some, other=0.0).to(tl.float32)
            c2 = tl.load(scale + at2, mask=more, other=0.0).to(tl.float32)
            f = None
            f2 = None
            if shift is not None:
                f = tl.load(shift + at, mask=some, other=0.0)
                f2 = tl.load(shift + at2, mask=more, other=0.0)
            y = _unit_x(x_start + here * 16, (token < tokens) & (here < groups), dtype, PERMUTE)
            y2 = _unit_x(x_start + here * 16 + 16, (token < tokens) & (here + 1 < groups), dtype, PERMUTE)
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
            p, p2 = _units(v, u, v2, u2, levels, table, dtype, BITS, PERMUTE)
            if WHOLE:
                w = tl.permute(_tree(*p, dtype), (2, 3, 1, 7, 6, 0, 5, 4))
                w2 = tl.permute(_tree(*p2, dtype), (2, 3, 1, 7, 6, 0, 5, 4))
            else:
                w = tl.permute(_to(_tree_scaled(*p, c, f, dtype), dtype), (2, 3, 1, 6, 5, 0, 4, 7))
                w2 = tl.permute(_to(_tree_scaled(*p2, c2, f2, dtype), dtype), (2, 3, 1, 6, 5, 0, 4, 7))
            w = tl.reshape(w, (SLICES, ROWS, 64))
            w2 = tl.reshape(w2, (SLICES, ROWS, 64))
            if WHOLE:
                acc += _dot(w, y) * c[:, :, None]
                acc += _dot(w2, y2) * c2[:, :, None]
                if shift is not None:
                    acc += _dot(ones, y) * f[:, :, None]
                    acc += _dot(ones, y2) * f2[:, :, None]
            else:
                acc += _dot(w, y)
                acc += _dot(w2, y2)
            if AHEAD:
                v, u, v2, u2 = next_v, next_u, next_v2, next_u2
        column = tl.arange(0, TOKENS)
        to = out + (expert * tokens + column)[None, :] * m + scaled[:, None]
        tl.store(to, _to(tl.sum(acc, 0), dtype), mask=(column < tokens)[None, :] & (scaled < m)[:, None])

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

    # Here the product runs over rows: lane 4·g + t holds unit g of 128 columns, of rows 4·t to 4·t + 3 of each sixteen.

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
            table = _table(levels, dtype, BITS)
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
            v, u = _fetch(codes, n, codes + base * row_bytes, unit, mask, BITS)
            v2, u2 = _fetch(codes, n, codes + (base + 1) * row_bytes, unit, mask, BITS)
            c = tl.load(scale + base * k + block, mask=mask, other=0.0).to(tl.float32)
            c2 = tl.load(scale + (base + 1) * k + block, mask=mask, other=0.0).to(tl.float32)
            f = None
            f2 = None
            if shift is not None:
                f = tl.load(shift + base * k + block, mask=mask, other=0.0)
                f2 = tl.load(shift + (base + 1) * k + block, mask=mask, other=0.0)
            at = x.to(tl.pointer_type(tl.int64)) + ((expert * tokens + token) * m + quad) // 4
            low, high = _words(tl.load(at, mask=(token < tokens) & (quad < end), other=0), PERMUTE)
            y = tl.join(_halves(low, dtype), _halves(high, dtype))  # (t, g, s, tokens / 8, r0, r1)
            y = tl.reshape(tl.permute(y, (2, 0, 5, 4, 3, 1)), (SLICES, 16, TOKENS))
            p, p2 = _units(v, u, v2, u2, levels, table, dtype, BITS, PERMUTE)
            w = _to(tl.join(_tree_scaled(*p, c, f, dtype), _tree_scaled(*p2, c2, f2, dtype)), dtype)
            w = tl.reshape(_natural(w, BITS), (SLICES, 128, 16))
            acc += _dot(w, y)
        place = tl.arange(0, 128)
        col = tl.program_id(0) * 128 + place % 8 * 16 + place // 8
        column = tl.arange(0, TOKENS)
        to = out + ((split * tl.num_programs(2) + expert) * tokens + column)[None, :] * n + col[:, None]
        tl.store(to, tl.sum(acc, 0), mask=(column < tokens)[None, :] & (col < n)[:, None])


def _planes_aligned(t_codes: Tensor, n: int, bits: int) -> bool:
    """Whether every eight columns of a plane start on a whole word of their own size."""
    return t_codes.data_ptr() % 8 == 0 and _planes_divide(n, bits)


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


def dequantize(t: Table, dtype: torch.dtype) -> Tensor:
    codes, scale, levels = t.codes.contiguous(), t.scale.contiguous(), t.levels.contiguous()
    shift = None if t.shift is None else t.shift.contiguous()
    rows, n, k = math.prod(codes.shape[:-1]), t.n, n_blocks(t.n, t.block)
    kind = dtype if dtype in FLOATS else torch.float32
    out = torch.empty(*codes.shape[:-1], n, dtype=kind, device=codes.device)
    if out.numel():
        size = row_bytes(n, t.bits)
        with _on(codes.device):
            if t.block % 8 == 0 and _planes_aligned(codes, n, t.bits) and rows * n // 8 < 2**31 - 1024:
                units, tile = rows * n // 8, 512
                grid, tensors = (-(-units // tile), 1, 1), (out, codes, scale, shift, levels)
                constants = (size, t.bits, t.block, tile)
                _launch(_dequantize_units, grid, tensors, (units, n // 8, k), constants, num_warps=4, enable_fp_fusion=False)
            else:
                tile = min(1024, triton.next_power_of_2(n))
                _dequantize_any[(rows, triton.cdiv(n, tile))](
                    out, codes, scale, shift, levels, n, k, size, t.bits, t.block, tile, num_warps=4, enable_fp_fusion=False
                )
    return out.to(dtype)


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
    with _on(W.device):
        if r.block % 8 == 0 and r.block <= 4096 and _planes_aligned(codes, n, r.bits) and rows * k < 2**31 - 1024:
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


def linear(x: Tensor, t: Table, transposed: bool) -> Tensor:
    *experts, m, _ = t.codes.shape
    inner, outer = (m, t.n) if transposed else (t.n, m)
    if x.shape[-1] != inner:
        raise Invalid(f"linear needs x with {inner} columns for a weight of {m} x {t.n} (transposed: {transposed}); x has {x.shape[-1]}")
    lead = tuple(x.shape[:-1]) if not experts else tuple(x.shape[len(experts) : -1])
    tokens = math.prod(lead)
    # An experts' weight takes one batch of tokens an expert; matmul's other broadcasts are left to the dense way.
    alike = not experts or (x.ndim == len(experts) + 2 and list(x.shape[:-2]) == experts)
    fragments = _fragmented(x, t, m, transposed)
    few = FRAGMENT_TOKENS if fragments else LANE_TOKENS
    if x.dtype not in FLOATS or not alike or not 0 < tokens <= few or not x.numel() or not t.codes.numel():
        W = dequantize(t, x.dtype)
        return x @ W if transposed else F.linear(x, W) if W.ndim == 2 else x @ W.mT
    x, codes, scale, levels = x.contiguous(), t.codes.contiguous(), t.scale.contiguous(), t.levels.contiguous()
    shift = None if t.shift is None else t.shift.contiguous()
    out = torch.empty(*x.shape[:-1], outer, dtype=x.dtype, device=x.device)
    ways = {
        (False, False): _by_lanes,
        (False, True): _by_lanes_transposed,
        (True, False): _by_fragments,
        (True, True): _by_fragments_transposed,
    }
    with _on(x.device):
        ways[fragments, transposed](out, x, codes, scale, shift, levels, t, math.prod(experts), m, tokens)
    return out


def _fragmented(x: Tensor, t: Table, m: int, transposed: bool) -> bool:
    """Whether units and quads of x start on whole words."""
    aligned = x.data_ptr() % 8 == 0 and t.codes.data_ptr() % 8 == 0 and t.n % 64 == 0 and t.block % 16 == 0
    return aligned and x.dtype in HALVES and (not transposed or m % 4 == 0)


def _by_fragments(out, x, codes, scale, shift, levels, t, e, m, tokens, rows=16, slices=8, ahead=True):
    constants = (t.n, t.bits, t.block, _padded(tokens), rows, slices, ahead, not INTERPRETED)
    numbers = (m, n_blocks(t.n, t.block), tokens, row_bytes(t.n, t.bits))
    tensors = (out, x, codes, scale, shift, levels)
    _launch(_fragments, (-(-m // rows), e, 1), tensors, numbers, constants, num_warps=slices, num_stages=1)


def _by_fragments_transposed(out, x, codes, scale, shift, levels, t, e, m, tokens, slices=4, split=None):
    padded, tiles = _padded(tokens), -(-t.n // 128) * e
    split = split or max(1, min(32, _power(-(-256 // tiles)), -(-m // (16 * slices))))
    share = -(-m // (split * 16 * slices)) * 16 * slices
    parts = torch.empty(split, *out.shape, dtype=torch.float32, device=out.device)
    constants = (t.n, share, t.bits, t.block, padded, slices, not INTERPRETED)
    numbers = (m, n_blocks(t.n, t.block), tokens, row_bytes(t.n, t.bits))
    tensors = (parts, x, codes, scale, shift, levels)
    _launch(_fragments_transposed, (-(-t.n // 128), split, e), tensors, numbers, constants, num_warps=slices, num_stages=1)
    _folded(out, parts, split)


def _folded(out, parts, split):
    _launch(_fold, (-(-out.numel() // 256), 1, 1), (out, parts), (out.numel(),), (split, 256), num_warps=2)


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length() if n > 0 else 1


def _padded(tokens: int) -> int:
    return max(8, _power(tokens))


def _by_lanes(out, x, codes, scale, shift, levels, t, e, m, tokens, rows=None, warps=4):
    together = min(4, triton.next_power_of_2(tokens))
    k, size = n_blocks(t.n, t.block), row_bytes(t.n, t.bits)
    if t.block % 8 == 0 and _planes_aligned(codes, t.n, t.bits) and x.data_ptr() % 8 == 0:
        rows = rows or 4
        grid = (-(-m // rows), -(-tokens // together), e)
        constants = (t.n, t.bits, t.block, together, rows, 32 * warps, not INTERPRETED)
        tensors = (out, x, codes, scale, shift, levels)
        _launch(_lanes_units, grid, tensors, (m, k, tokens, size), constants, num_warps=warps, num_stages=1)
    else:
        rows = rows or 8
        _lanes[(triton.cdiv(m, rows), triton.cdiv(tokens, together), e)](
            out, x, codes, scale, shift, levels, m, k, tokens, t.n, size, t.bits, t.block, together, rows, 256, num_warps=warps
        )


def _by_lanes_transposed(out, x, codes, scale, shift, levels, t, e, m, tokens, rows=8, cols=256, split=None):
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
    _folded(out, parts, split)
