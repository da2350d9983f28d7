"""`linear`: x @ Wᵀ or x @ W by the way that costs least, fragments, lanes or dense.

A product of few tokens costs the bytes of its codes, so it reads these alone. One of many costs its arithmetic, which the library's product
of dense halves does best: the dense way writes the weight once and reads it back (2 + 2 bytes a weight in a half precision, beside the codes).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from finebits.errors import Invalid
from finebits.kernels.cuda.dense import dequantize
from finebits.kernels.cuda.fragments import by_fragments, by_fragments_transposed
from finebits.kernels.cuda.lanes import by_lanes, by_lanes_transposed
from finebits.kernels.cuda.launch import FLOATS, on
from finebits.kernels.table import Table

HALVES = (torch.float16, torch.bfloat16)
# More tokens than these go the dense way.
FRAGMENT_TOKENS = 32
LANE_TOKENS = 8


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
        (False, False): by_lanes,
        (False, True): by_lanes_transposed,
        (True, False): by_fragments,
        (True, True): by_fragments_transposed,
    }
    with on(x.device):
        ways[fragments, transposed](out, x, codes, scale, shift, levels, t, math.prod(experts), m, tokens)
    return out


def _fragmented(x: Tensor, t: Table, m: int, transposed: bool) -> bool:
    """Whether units and quads of x start on whole words."""
    aligned = x.data_ptr() % 8 == 0 and t.codes.data_ptr() % 8 == 0 and t.n % 64 == 0 and t.block % 16 == 0
    return aligned and x.dtype in HALVES and (not transposed or m % 4 == 0)
