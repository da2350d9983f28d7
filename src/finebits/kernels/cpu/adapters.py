"""Rows of different adapters through one layer: native/adapters/grouped.c, over factors that lie in a pool of pages."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from ctypes import byref, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from finebits.kernels.cpu.binding import available, level, library
from finebits.kernels.laid import Group, Groups

SMALL = 8  # rows of one adapter that are multiplied one by one; torch has larger groups


class Grouped(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("x", "y", "group")),
        *((field, c_int64) for field in ("groups", "rows", "n", "m", "rank")),
    ]


@functools.cache
def body() -> Any:
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


def grouped(x: Tensor, y: Tensor, groups: Groups, module: str) -> Sequence[Group]:
    """y (t, m) += s·(x Aᵀ) Bᵀ in place, of the rows of x (t, n) that are an adapter's over this module, all small groups in one call; the
    others are given back."""
    if not takes(x, y):
        return groups
    small, left, rank = list[int](), list[Group](), 0
    for group in groups:
        laid = None if group.adapter is None else group.adapter.at.get(module)
        if laid is None:
            continue
        if group.stop - group.start > SMALL:
            left.append(group)
            continue
        kept = laid.__dict__
        if "native" not in kept:
            kept["native"] = described(laid.A, laid.B, laid.s)
        small += (group.start, group.stop, kept["native"].buffer_info()[0])
        rank = max(rank, laid.rank)
    if small:
        _add(x, y, array("Q", small), rank)
    return left


def _add(x: Tensor, y: Tensor, groups: array[int], rank: int) -> None:
    """Of `struct rows_of`, three words each."""
    function = body()
    assert function is not None
    job = Grouped(x.data_ptr(), y.data_ptr(), groups.buffer_info()[0], len(groups) // 3, len(x), x.shape[1], y.shape[1], rank)
    if function(byref(job), level(), torch.get_num_threads()):
        raise MemoryError("finebits grouped: no memory for the working buffers")
