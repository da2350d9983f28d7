"""The shared library: where it is, the structures it takes, and the instruction set that it runs with. native/jobs.h is the other side."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

from finebits.errors import Invalid

VARIABLE = "FINEBITS_CPU"
LIBRARY = Path(__file__).parent.with_name("_cpu.so")
LEVELS = ("scalar", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Packed(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("codes", "scale", "shift", "levels")),
        *((field, c_int64) for field in ("rows", "n", "row_bytes", "blocks", "block")),
        *((field, c_int32) for field in ("bits", "store")),
    ]


class Grid(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("mids", "order")),
        *((field, c_float) for field in ("peak", "first")),
        *((field, c_int32) for field in ("minmax", "store", "uniform", "n_mids", "n_order", "bits")),
        ("block", c_int64),
    ]


class Quantize(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("w", "codes", "scale", "shift")),
        *((field, c_int64) for field in ("rows", "n", "row_bytes", "blocks")),
        ("dtype", c_int32),
        ("r", Grid),
    ]


class Dequantize(ctypes.Structure):
    _fields_ = [("t", Packed), ("out", c_void_p), *((field, c_int64) for field in ("start", "stop", "stride")), ("dtype", c_int32)]


class Successive(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("w", "u", "scale", "shift", "block", "levels", "codes", "error")),
        *((field, c_int64) for field in ("columns", "rows")),
        ("r", Grid),
    ]


class Search(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("w", "d", "scale", "shift", "levels", "factors", "rests")),
        *((field, c_int64) for field in ("columns", "rows")),
        ("middle", c_float),
        *((field, c_int32) for field in ("n_factors", "refits", "zero")),
        ("r", Grid),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(LIBRARY))
    for job in (lib.finebits_quantize, lib.finebits_dequantize, lib.finebits_successive, lib.finebits_search):
        job.argtypes, job.restype = (c_void_p, c_int, c_int), c_int
    lib.finebits_product.argtypes = c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int, c_int, c_int
    lib.finebits_matrix_unit.argtypes = ()
    lib.finebits_large_pages.argtypes, lib.finebits_large_pages.restype = (c_void_p, c_size_t), None
    return lib


@functools.cache
def level() -> int:
    """The instruction set in use, as an index of LEVELS: the best one of this machine, or the one that FINEBITS_CPU names."""
    best, wanted = library().finebits_level(), os.environ.get(VARIABLE)
    if wanted is None:
        return best
    if wanted not in LEVELS[: best + 1]:
        raise Invalid(f"{VARIABLE} is {wanted!r}; on this machine it can be {', '.join(LEVELS[: best + 1])}")
    return LEVELS.index(wanted)


def available() -> str | None:
    """None, or the reason why these bodies cannot run here."""
    if not LIBRARY.exists():
        return "the CPU kernels were not compiled: install a C compiler (gcc or clang), then install finebits again from source"
    try:
        level()
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    except AttributeError as error:
        return f"{LIBRARY.name} was compiled from other sources than these: install finebits again from source ({error})"
    return None


def call(job: str, struct: ctypes.Structure) -> None:
    if getattr(library(), f"finebits_{job}")(byref(struct), level(), torch.get_num_threads()):
        raise MemoryError(f"finebits {job}: no memory for the working buffers")
