"""quantize, successive and search: arguments are checked and put into the library's structures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finebits.blocks import n_blocks, row_bytes
from finebits.errors import Invalid
from finebits.kernels import reference
from finebits.kernels.cpu.binding import DTYPES, Grid, Quantize, Search, Successive, call
from finebits.kernels.cpu.buffers import empty
from finebits.kernels.table import Rounding

STORE_CODES = {"fp32": 0, "fp16": 1, "bf16": 2, "e4m3": 3}  # how a scale is rounded; the last one by `search` alone
COPIED_BYTES = 32 << 20  # of a weight that is not contiguous, at a time


def quantize(W: Tensor, r: Rounding) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bit-exactly reference.quantize, with no more memory than the result and, for a W that is not contiguous, one panel."""
    n, k = W.shape[-1], n_blocks(W.shape[-1], r.block)
    if W.dtype not in DTYPES or W.numel() == 0:
        return reference.quantize(W, r)
    store, minmax = reference.STORES[r.store], r.mode != "absmax"
    codes = empty((*W.shape[:-1], row_bytes(n, r.bits)), torch.uint8)
    scale = torch.empty(*W.shape[:-1], k, dtype=store)
    shift = torch.empty_like(scale) if minmax else None
    rounding, _pointed_into = _grid(r)
    at = 0
    for rows in _panels(W):
        m = rows.shape[0]
        job = Quantize(
            rows.data_ptr(),
            codes.data_ptr() + at * codes.shape[-1],
            scale.data_ptr() + at * k * store.itemsize,
            None if shift is None else shift.data_ptr() + at * k * store.itemsize,
            *(m, n, codes.shape[-1], k, DTYPES[W.dtype], rounding),
        )
        call("quantize", job)
        at += m
    return codes, scale, shift


def _grid(r: Rounding) -> tuple[Grid, tuple[Tensor, Tensor]]:
    """As the library wants it, and the tensors that it points into."""
    mids, order = r.mids.to("cpu", torch.float32).contiguous(), r.order.to("cpu").contiguous()
    if not r.uniform and mids.numel() >= order.numel() or order.numel() > 256 or r.uniform and order.numel() < 2**r.bits:
        raise Invalid(f"a rounding to {r.bits} bits has {mids.numel()} midpoints and an order of {order.numel()} codes")
    numbers = r.mode != "absmax", STORE_CODES[r.store], r.uniform, mids.numel(), order.numel(), r.bits, r.block
    return Grid(mids.data_ptr(), order.data_ptr(), r.peak, r.first, *numbers), (mids, order)


def successive(
    W: Tensor, U: Tensor, scale: Tensor, shift: Tensor | None, block: Tensor, levels: Tensor, r: Rounding
) -> tuple[Tensor, Tensor]:
    """Bit-exactly reference.successive."""
    c, m = W.shape
    if U.shape != (c, c) or block.shape != (c,) or any(s is not None and (s.ndim != 2 or s.shape[1] != m) for s in (scale, shift)):
        beside = f"U {tuple(U.shape)}, scale {tuple(scale.shape)} and block {tuple(block.shape)}"
        raise Invalid(f"columns {tuple(W.shape)} come with {beside}; wanted were ({c}, {c}), (blocks, {m}) and ({c},)")
    if W.numel() == 0 or W.dtype != torch.float32:
        return reference.successive(W, U, scale, shift, block, levels, r)
    low, high, ranks = int(block.min()), int(block.max()), 2**r.bits if r.uniform else r.mids.numel() + 1
    if low < 0 or high >= len(scale) or levels.numel() < 2**r.bits or ranks != r.order.numel():
        raise Invalid(f"blocks {low} to {high} of {len(scale)}, {levels.numel()} levels and {ranks} ranks do not go together")
    codes, E = torch.empty(c, m, dtype=torch.uint8), torch.empty(c, m)
    inputs = [t if t is None else t.float().contiguous() for t in (W, U, scale, shift)]
    of, levels, (rounding, _pointed_into) = block.long().contiguous(), levels.float().contiguous(), _grid(r)
    pointers = [None if t is None else t.data_ptr() for t in (*inputs, of, levels, codes, E)]
    call("successive", Successive(*pointers, c, m, rounding))
    return codes, E


def search(
    W: Tensor,
    d: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    levels: Tensor,
    r: Rounding,
    factors: Sequence[float],
    refits: int,
    zero: bool,
) -> tuple[Tensor, Tensor | None]:
    """quantizers._family.searched, up to the rounding of its sums; scales in float32, blocks first as W's columns are."""
    c, m = W.shape
    shape = n_blocks(c, r.block or c), m
    if d.shape != (c,) or any(s is not None and s.shape != shape for s in (scale, shift)) or levels.numel() < 2**r.bits:
        beside = f"{tuple(d.shape)} weights, scale {tuple(scale.shape)} and {levels.numel()} levels"
        raise Invalid(f"columns {tuple(W.shape)} come with {beside}; wanted were ({c},), {shape} and {2**r.bits}")
    W, d, levels = (t.float().contiguous() for t in (W, d, levels))
    mine = lambda t: t.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # noqa: E731
    scale, shift = mine(scale), None if shift is None else mine(shift)
    factor, rest = torch.tensor(factors), torch.tensor([1 - f for f in factors])
    rounding, _pointed_into = _grid(r)
    pointers = [None if t is None else t.data_ptr() for t in (W, d, scale, shift, levels, factor, rest)]
    middle = float((levels.max() + levels.min()) / 2)
    if W.numel():
        call("search", Search(*pointers, c, m, middle, len(factors), refits, zero, rounding))
    return scale, shift


def _panels(W: Tensor) -> Iterator[Tensor]:
    """W (*e, m, n) as contiguous matrices of rows, in order."""
    if W.is_contiguous():
        yield W.view(-1, W.shape[-1])
    elif W.ndim > 2:
        for expert in W:
            yield from _panels(expert)
    else:
        step = max(1, COPIED_BYTES // (W.shape[-1] * W.element_size()))
        for rows in W.split(step):
            yield rows.contiguous()
