"""The sum of partial results of products whose rows were split: parts (SPLIT, size) float32 -> out (size,).

Always in the order of the splits, so that the result does not depend on what ran first. Reads 4 · SPLIT bytes an output and writes it once;
SPLIT loads and additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from finebits.kernels.cuda.language import rounded
from finebits.kernels.cuda.launch import launch


@triton.jit
def _fold(out, parts, size, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """Sum of SPLIT partial results, in order."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    acc = tl.zeros((TILE,), tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(out + at, rounded(acc, out.dtype.element_ty), mask=at < size)


def folded(out, parts, split):
    launch(_fold, (-(-out.numel() // 256), 1, 1), (out, parts), (out.numel(),), (split, 256), num_warps=2)
