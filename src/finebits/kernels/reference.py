"""The plain torch bodies. They define what is right; every other body must agree with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finebits.blocks import cut, join, pack, spread, unpack
from finebits.kernels.laid import Group, Groups
from finebits.kernels.table import Rounding, Table

name = "reference"
STORES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def available() -> str | None:
    """None: this body always runs."""
    return None


def supports(job: str, device: torch.device, bits: int) -> bool:
    return True


def dequantize(t: Table, dtype: torch.dtype) -> Tensor:
    """(*e, m, n) in `dtype`."""
    code = unpack(t.codes, t.bits, t.n)
    w = t.levels[code.long()] * spread(t.scale.float(), t.block, t.n)
    if t.shift is not None:
        w = w + spread(t.shift, t.block, t.n)
    return w.to(dtype)


def linear(x: Tensor, t: Table, transposed: bool) -> Tensor:
    """x @ Wᵀ, or x @ W if `transposed`; the weight is rounded to x.dtype first. x (*b, n) or (*b, m)."""
    W = dequantize(t, x.dtype)
    return x @ (W if transposed else W.mT)


def quantize(W: Tensor, r: Rounding) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round-to-nearest of a whole matrix (*e, m, n): packed codes, scale in its store, shift in its store or None."""
    w = cut(W.float(), r.block, fill=torch.nan)
    shift = None
    if r.mode == "absmax":
        scale = w.abs().nan_to_num(0.0).amax(-1) / r.peak
    else:
        low = w.nan_to_num(torch.inf, torch.inf, -torch.inf).amin(-1)
        shift = low.to(STORES[r.store])
        scale = (w.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(-1) - low) / r.peak
    scale = scale.to(STORES[r.store])
    return pack(encode(join(w, W.shape[-1]), scale, shift, r), r.bits), scale, shift


def encode(W: Tensor, scale: Tensor, shift: Tensor | None, r: Rounding) -> Tensor:
    """Codes (one a byte) of W (*e, m, n) under given scales (*e, m, k)."""
    n = W.shape[-1]
    s = scale.float()
    u = W.float()
    if shift is not None:
        u = u - spread(shift.float(), r.block, n)
    u = u * spread(torch.where(s >= 2.0**-126, 1 / s, 0.0), r.block, n)
    if r.uniform:
        rank = (u.round() - r.first).clamp(0, 2**r.bits - 1).to(torch.uint8)
    else:
        rank = torch.bucketize(u.contiguous(), r.mids).to(torch.uint8)
    return r.order[rank.long()]


def successive(
    W: Tensor, U: Tensor, scale: Tensor, shift: Tensor | None, block: Tensor, levels: Tensor, r: Rounding
) -> tuple[Tensor, Tensor]:
    """Columns rounded one after the other; what each loses, E_k = (W_k − Ŵ_k) / U_kk, is taken off the later ones: W_j ← W_j − U_kj E_k.

    A column is a row here: W (c, m) float32, U (c, c) upper triangular, scale and shift (k, m) float32, block (c,) int64, the row of scale
    that a column has; levels by code. Gives the codes, one a byte, and E, both (c, m).
    """
    w, E = W.clone(), torch.empty_like(W)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    one = r._replace(block=1)
    for k, b in enumerate(block.tolist()):
        z = None if shift is None else shift[b]
        codes[k] = encode(w[k, :, None], scale[b, :, None], None if z is None else z[:, None], one)[:, 0]
        value = levels[codes[k].long()] * scale[b]
        E[k] = (w[k] - (value if z is None else value + z)) / U[k, k]
        w[k + 1 :] -= U[k, k + 1 :, None] * E[k]
    return codes, E


def grouped(x: Tensor, y: Tensor, groups: Groups, module: str) -> Sequence[Group]:
    """All of them are left to torch (finebits.serve.grouped)."""
    return groups
