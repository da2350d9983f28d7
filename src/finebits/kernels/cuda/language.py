"""What Triton's language lacks: casts and products that the interpreter gets right too, and registers taken apart.

Words hold their parts in the order of memory: the low half comes first. Taking a register apart costs nothing or one instruction, a cast
from float32 to bf16 half of one (two values at a time).
"""

from __future__ import annotations

import triton
import triton.language as tl

from finebits.kernels.cuda.launch import INTERPRETED

# The interpreter's cast from float32 to bfloat16 does not round to nearest even; compiled code does.
_BY_HAND = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """v.to(dtype), rounded to nearest even."""
    if _BY_HAND and dtype == tl.bfloat16 and v.dtype == tl.float32:
        bits = v.to(tl.uint32, bitcast=True)
        bits = tl.where(v == v, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return v.to(dtype)


@triton.jit
def dot(a, b):
    if _BY_HAND:  # the interpreter multiplies the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)


@triton.jit
def words(v, PERMUTE: tl.constexpr):
    """The halves of a 64-bit word. The compiler splits registers for nothing, but shifts by 16 + 32 when it sees the shift."""
    if PERMUTE:
        return tl.inline_asm_elementwise("mov.b64 {$0, $1}, $2;", "=r,=r,l", [v], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    else:
        return v.to(tl.int32), (v >> 32).to(tl.int32)


@triton.jit
def halves(v, dtype: tl.constexpr):
    low = (v & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (v >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high)
