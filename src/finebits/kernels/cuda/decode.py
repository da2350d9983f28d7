"""From packed codes to levels in registers, two a register, as tensor cores take them.

Sixteen codes of one row (a unit) become eight registers of two levels each, numbered p = 4·p2 + 2·p1 + p0; r picks the level inside the
register. Which column 8·i3 + 4·i2 + 2·i1 + i0 of the unit sits where is the decoder's choice:

    4 and 8 bits    p2 p1 p0 r = i3 i2 i1 i0
    3 bits          p2 p1 p0 r = i1 i0 i3 i2
    2 bits          p2 p1 p0 r = i0 i3 i2 i1

and x is loaded in the same order. Tables hold the levels' low bytes and high bytes apart, four to a word, for `prmt`, which picks four
bytes out of eight by the nibbles of a selector: the codes of 4 bits are one, those of 3 and 2 bits are made into one. 8 bits have no such
table: a level is a load from the cache.

Bytes: codes once (2 · bits a unit). Instructions: a selector of eight codes takes 21 at 4 bits, of which 16 are `prmt` (one picks among eight
levels: two look-ups, and a choice between them), and 9 at 3 and 2 bits, of which 8 are. Scaling the weights of a register takes one where
the scale is held in x.dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from finebits.kernels.cuda.language import halves, rounded, words

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
    return rounded(tl.load(levels + i), dtype).to(tl.uint16, bitcast=True).to(tl.uint32)


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
def byte_table(levels, dtype: tl.constexpr, BITS: tl.constexpr):
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
def tree(p0, p1, p2, p3, p4, p5, p6, p7, dtype: tl.constexpr):
    """Eight registers -> four new last dimensions (r, p0, p1, p2)."""
    low = tl.join(tl.join(halves(p0, dtype), halves(p1, dtype)), tl.join(halves(p2, dtype), halves(p3, dtype)))
    high = tl.join(tl.join(halves(p4, dtype), halves(p5, dtype)), tl.join(halves(p6, dtype), halves(p7, dtype)))
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
def tree_scaled(p0, p1, p2, p3, p4, p5, p6, p7, c, f, dtype: tl.constexpr):
    """As `tree`, of float32 weights, with r the last dimension: (p0, p1, p2, r)."""
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
def fetch(codes, n, row, unit, mask, BITS: tl.constexpr):
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
def _decoded_unit(v, u, levels, table, dtype: tl.constexpr, BITS: tl.constexpr, PERMUTE: tl.constexpr):
    """The eight registers of one unit of 2, 4 or 8 bits."""
    if BITS == 4:
        low, high = words(v, PERMUTE)
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
def _decoded_units_3(v, u, v2, u2, levels, table, dtype: tl.constexpr, PERMUTE: tl.constexpr):
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
def decoded_units(v, u, v2, u2, levels, table, dtype: tl.constexpr, BITS: tl.constexpr, PERMUTE: tl.constexpr):
    """The registers of two units."""
    if BITS == 3:
        return _decoded_units_3(v, u, v2, u2, levels, table, dtype, PERMUTE)
    else:
        return _decoded_unit(v, u, levels, table, dtype, BITS, PERMUTE), _decoded_unit(v2, u2, levels, table, dtype, BITS, PERMUTE)


@triton.jit
def unit_of_x(x, mask, dtype: tl.constexpr, PERMUTE: tl.constexpr):
    """Sixteen columns of x at 8-byte pointers `x`: the dimensions of `x`, then i0, i1, i2, i3."""
    a, b = words(tl.load(x, mask=mask, other=0), PERMUTE)
    c, d = words(tl.load(x + 1, mask=mask, other=0), PERMUTE)
    e, f = words(tl.load(x + 2, mask=mask, other=0), PERMUTE)
    g, h = words(tl.load(x + 3, mask=mask, other=0), PERMUTE)
    return tree(a, b, c, d, e, f, g, h, dtype)
