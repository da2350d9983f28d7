"""Rows of different adapters through one layer: native/adapters/grouped.c, over factors that lie in a pool of pages."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from ctypes import byref, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from finebits.kernels.cpu.binding import available, level, library


class Grouped(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("x", "y", "group")),
        *((field, c_int64) for field in ("groups", "rows", "n", "m", "rank")),
    ]


@functools.cache
def body() -> ctypes._CFuncPtr | None:
    """The library's function; None where there is no library, or one that was compiled before it had this."""
    found = getattr(library(), "finebits_grouped", None) if available() is None else None
    if found is not None:
        found.argtypes, found.restype = (c_void_p, c_int, c_int), c_int
    return found


def takes(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype == torch.float32 and x.is_cpu and x.is_contiguous() and y.is_contiguous() and body() is not None


def described(A: Sequence[Tensor], B: Sequence[Tensor], s: float) -> array[int]:
    """`struct laid` of pieces (k, n) of A and (k, m) of Bᵀ, each contiguous and float32, which stay where they are while it is used."""
    scale = int.from_bytes(memoryview(array("d", [s])).cast("B"), "little")
    return array("Q", [len(A), len(B), scale, *(word for piece in (*A, *B) for word in (piece.data_ptr(), len(piece)))])


def add(x: Tensor, y: Tensor, groups: Sequence[tuple[int, int, array[int]]], rank: int) -> None:
    """y (t, m) += s·(x Aᵀ) Bᵀ in place, of rows start:stop of x (t, n) for every (start, stop, described)."""
    function = body()
    assert function is not None
    flat = array("Q", [word for start, stop, laid in groups for word in (start, stop, laid.buffer_info()[0])])
    job = Grouped(x.data_ptr(), y.data_ptr(), flat.buffer_info()[0], len(groups), len(x), x.shape[1], y.shape[1], rank)
    if function(byref(job), level(), torch.get_num_threads()):
        raise MemoryError("finebits grouped: no memory for the working buffers")
