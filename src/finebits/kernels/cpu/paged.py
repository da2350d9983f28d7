"""One query of each request over keys and values in the pages of a pool: native/attention/paged.c."""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from finebits.kernels.cpu.binding import available, level, library


class Paged(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("q", "store", "table", "length", "out")),
        *((field, c_int64) for field in ("requests", "heads", "kv", "width", "tokens", "blocks", "page", "window")),
        ("scale", c_float),
    ]


@functools.cache
def body() -> Any:
    """The library's function; None where there is no library, or one that was compiled before it had this."""
    found = getattr(library(), "finebits_paged", None) if available() is None else None
    if found is not None:
        found.argtypes, found.restype = (c_void_p, c_int, c_int), c_int
    return found


def takes(q: Tensor, store: Tensor) -> bool:
    return q.dtype == store.dtype == torch.float32 and q.is_cpu and store[0].is_contiguous() and body() is not None


def attend(q: Tensor, store: Tensor, table: Tensor, lengths: Tensor, window: int | None, scale: float | None) -> Tensor:
    """(requests, heads, width) of queries of that shape over `store` (pages, 2, tokens, kv heads, width), with the pages of each request in
    `table` (requests, blocks), int64, and how many tokens it has in `lengths`, int64, at least 1."""
    q, table, lengths = q.contiguous(), table.contiguous(), lengths.contiguous()
    out = torch.empty_like(q)
    _, _, tokens, kv, width = store.shape
    addresses = (t.data_ptr() for t in (q, store, table, lengths, out))
    sizes = (len(q), q.shape[1], kv, width, tokens, table.shape[1], store.stride(0), window or 0)
    job = Paged(*addresses, *sizes, width**-0.5 if scale is None else scale)
    function = body()
    assert function is not None
    if function(byref(job), level(), torch.get_num_threads()):
        raise MemoryError("finebits paged: no memory for the working buffers")
    return out
