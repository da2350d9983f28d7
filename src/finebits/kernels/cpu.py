"""Native CPU bodies: C compiled by the package's own build, one library for all instruction sets, loaded by ctypes.

The library decodes and encodes whole rows in registers. Products of few tokens run on the packed codes; those of many decode panels of
the weight into bounded scratch buffers and multiply them there, in bfloat16 with AVX-512 and in float32 otherwise. Many tokens are left to
torch without AVX2, and where it has a matrix unit for bfloat16.
Nothing is repacked or cached for a weight.
FINEBITS_CPU=avx512, avx2 or scalar holds the library to that instruction set.

Results do not depend on the number of threads, nor on what ran before.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from finebits.blocks import n_blocks, row_bytes
from finebits.errors import Invalid
from finebits.kernels import reference
from finebits.kernels.table import Rounding, Table

name = "cpu"
VARIABLE = "FINEBITS_CPU"
LIBRARY = Path(__file__).with_name("_cpu.so")
LEVELS = ("scalar", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HELD = {"fp32": 0, "fp16": 1, "bf16": 2, "e4m3": 3}  # how a scale is rounded; the last one by `search` alone

PANEL_BYTES = 32 << 20
TOKENS = 1024  # whose activations are widened at a time
LARGE_PAGES_FROM = 4 << 20


class _Table(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("codes", "scale", "shift", "levels")),
        *((field, c_int64) for field in ("rows", "n", "row_bytes", "blocks", "block")),
        *((field, c_int32) for field in ("bits", "store")),
    ]


class _Rounding(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("mids", "order")),
        *((field, c_float) for field in ("peak", "first")),
        *((field, c_int32) for field in ("minmax", "store", "uniform", "n_mids", "n_order", "bits")),
        ("block", c_int64),
    ]


class _Quantize(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("w", "codes", "scale", "shift")),
        *((field, c_int64) for field in ("rows", "n", "row_bytes", "blocks")),
        ("dtype", c_int32),
        ("r", _Rounding),
    ]


class _Dequantize(ctypes.Structure):
    _fields_ = [("t", _Table), ("out", c_void_p), *((field, c_int64) for field in ("start", "stop", "stride")), ("dtype", c_int32)]


class _Successive(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("w", "u", "scale", "shift", "block", "levels", "codes", "error")),
        *((field, c_int64) for field in ("columns", "rows")),
        ("r", _Rounding),
    ]


class _Search(ctypes.Structure):
    _fields_ = [
        *((field, c_void_p) for field in ("w", "d", "scale", "shift", "levels", "factors", "rests")),
        *((field, c_int64) for field in ("columns", "rows")),
        ("middle", c_float),
        *((field, c_int32) for field in ("n_factors", "refits", "zero")),
        ("r", _Rounding),
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


def supports(job: str, device: torch.device, bits: int) -> bool:
    return device.type == "cpu" and 1 <= bits <= 8


def quantize(W: Tensor, r: Rounding) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bit-exactly reference.quantize, with no more memory than the result and, for a W that is not contiguous, one panel."""
    n, k = W.shape[-1], n_blocks(W.shape[-1], r.block)
    if W.dtype not in DTYPES or W.numel() == 0:
        return reference.quantize(W, r)
    store, minmax = reference.STORES[r.store], r.mode != "absmax"
    codes = _empty((*W.shape[:-1], row_bytes(n, r.bits)), torch.uint8)
    scale = torch.empty(*W.shape[:-1], k, dtype=store)
    shift = torch.empty_like(scale) if minmax else None
    rounding, _pointed_into = _rounding(r)
    at = 0
    for rows in _panels(W):
        m = rows.shape[0]
        job = _Quantize(
            rows.data_ptr(),
            codes.data_ptr() + at * codes.shape[-1],
            scale.data_ptr() + at * k * store.itemsize,
            None if shift is None else shift.data_ptr() + at * k * store.itemsize,
            *(m, n, codes.shape[-1], k, DTYPES[W.dtype], rounding),
        )
        _call("quantize", job)
        at += m
    return codes, scale, shift


def _rounding(r: Rounding) -> tuple[_Rounding, tuple[Tensor, Tensor]]:
    """As the library wants it, and the tensors that it points into."""
    mids, order = r.mids.to("cpu", torch.float32).contiguous(), r.order.to("cpu").contiguous()
    if not r.uniform and mids.numel() >= order.numel() or order.numel() > 256 or r.uniform and order.numel() < 2**r.bits:
        raise Invalid(f"a rounding to {r.bits} bits has {mids.numel()} midpoints and an order of {order.numel()} codes")
    numbers = r.mode != "absmax", HELD[r.store], r.uniform, mids.numel(), order.numel(), r.bits, r.block
    return _Rounding(mids.data_ptr(), order.data_ptr(), r.peak, r.first, *numbers), (mids, order)


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
    given = [t if t is None else t.float().contiguous() for t in (W, U, scale, shift)]
    of, levels, (rounding, _pointed_into) = block.long().contiguous(), levels.float().contiguous(), _rounding(r)
    pointers = [None if t is None else t.data_ptr() for t in (*given, of, levels, codes, E)]
    _call("successive", _Successive(*pointers, c, m, rounding))
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
    some, rests = torch.tensor(factors), torch.tensor([1 - f for f in factors])
    rounding, _pointed_into = _rounding(r)
    pointers = [None if t is None else t.data_ptr() for t in (W, d, scale, shift, levels, some, rests)]
    middle = float((levels.max() + levels.min()) / 2)
    if W.numel():
        _call("search", _Search(*pointers, c, m, middle, len(factors), refits, zero, rounding))
    return scale, shift


def dequantize(t: Table, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Bit-exactly reference.dequantize; into `out` if given, which saves the page faults of a new tensor."""
    shape = (*t.codes.shape[:-1], t.n)
    if out is not None and (out.shape != shape or out.dtype != dtype or not out.is_contiguous()):
        raise Invalid(f"out must be contiguous {shape} {dtype}, not {tuple(out.shape)} {out.dtype}")
    if dtype not in DTYPES or math.prod(shape) == 0 or _differentiable(t):
        W = reference.dequantize(t, dtype)
        return W if out is None else out.copy_(W)
    if out is None:
        out = _empty(shape, dtype)
    _decode(_rows(t), out, 0, t.n)
    return out


def placed(t: Tensor) -> Tensor:
    """A contiguous copy in large pages, where it is large enough to fill some: small ones end the processor's prefetching every 4 KiB."""
    return _empty(tuple(t.shape), t.dtype).copy_(t)


def linear(x: Tensor, t: Table, transposed: bool = False) -> Tensor:
    """x @ Wᵀ, or x @ W if `transposed`, differentiable in x. Experts (*e, m, n) take part as in torch.matmul."""
    if x.dtype not in DTYPES or not x.is_cpu or _differentiable(t):
        return reference.linear(x, t, transposed)
    if x.requires_grad and torch.is_grad_enabled():
        return _Product.apply(x, t, transposed)
    rows, shape = _rows(t), x.shape
    *experts, m = rows.lead
    inputs, outputs = (m, t.n) if transposed else (t.n, m)
    if not shape or shape[-1] != inputs:
        raise Invalid(f"x must end in {inputs} columns for a weight {(*rows.lead, t.n)}, transposed={transposed}; it is {tuple(shape)}")
    if not experts:
        y = _empty((*shape[:-1], outputs), x.dtype)
        _product(x, rows, y, transposed)
        return y
    single = x.ndim == 1
    x = x[None] if single else x
    batch = torch.broadcast_shapes(x.shape[:-2], experts)
    y = torch.empty(*batch, x.shape[-2], outputs, dtype=x.dtype)
    number = torch.arange(math.prod(experts)).view(experts).expand(batch).flatten().tolist()
    xs = x.expand(*batch, *x.shape[-2:])
    ys = y.view(-1, *y.shape[-2:])
    for i, (e, at) in enumerate(zip(number, torch.cartesian_prod(*map(torch.arange, batch)).view(-1, len(batch)).tolist())):
        _product(xs[tuple(at)], rows.expert(e, m), ys[i], transposed)
    return y[..., 0, :] if single else y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, t: Table, transposed: bool) -> Tensor:
        ctx.t, ctx.transposed, ctx.shape = t, transposed, x.shape
        return linear(x, t, transposed)

    @staticmethod
    def backward(ctx, grad: Tensor):
        single = len(ctx.shape) == 1 and ctx.t.codes.ndim > 2
        g = linear(grad[..., None, :] if single else grad, ctx.t, not ctx.transposed)
        return (g[..., 0, :] if single else g).sum_to_size(ctx.shape), None, None


class _Rows:
    """All rows of a table, experts one after the other, as the library wants them."""

    def __init__(self, t: Table):
        *lead, nbytes = t.codes.shape
        k = n_blocks(t.n, t.block)
        shift = t.shift
        if nbytes != row_bytes(t.n, t.bits) or t.codes.dtype != torch.uint8 or t.levels.numel() < 2**t.bits:
            raise Invalid(f"{t.n} codes of {t.bits} bits take {row_bytes(t.n, t.bits)} bytes a row and {2**t.bits} levels, "
                             f"not {t.codes.dtype} {tuple(t.codes.shape)} and {t.levels.numel()} levels")  # fmt: skip
        for per_block in (t.scale,) if shift is None else (t.scale, shift):
            if per_block.shape != (*lead, k) or per_block.dtype not in DTYPES:
                raise Invalid(f"a weight {(*lead, t.n)} in blocks of {t.block} has {(*lead, k)} scales, not {tuple(per_block.shape)}")
        codes, scale, levels = t.codes.contiguous(), t.scale.contiguous(), t.levels.float().contiguous()
        shift = None if shift is None else shift.float().contiguous()
        self.kept = codes, scale, shift, levels
        self.at, self.lead = self.pointers(), tuple(lead)
        self.struct = _Table(*self.at, math.prod(lead), t.n, nbytes, k, t.block, t.bits, DTYPES[scale.dtype])

    def pointers(self) -> tuple[int, int, int | None, int]:
        codes, scale, shift, levels = self.kept
        return codes.data_ptr(), scale.data_ptr(), None if shift is None else shift.data_ptr(), levels.data_ptr()

    def some(self, first: int, last: int) -> _Table:
        """Rows [first, last)."""
        s, at = self.struct, first * self.struct.blocks
        return _Table(
            s.codes + first * s.row_bytes,
            s.scale + at * self.kept[1].itemsize,
            None if s.shift is None else s.shift + at * 4,
            s.levels,
            *(last - first, s.n, s.row_bytes, s.blocks, s.block, s.bits, s.store),
        )

    def expert(self, e: int, m: int) -> _Rows:
        rows = object.__new__(_Rows)
        rows.kept, rows.struct = self.kept, self.some(e * m, (e + 1) * m)
        return rows


def _rows(t: Table) -> _Rows:
    """Kept with the table, where it reads the table's own tensors and these are where they were (share_memory_ moves them)."""
    rows = t.__dict__.get("rows")
    if rows is None or rows.at != rows.pointers():
        rows = _Rows(t)
        if all(kept is own for kept, own in zip(rows.kept, (t.codes, t.scale, t.shift, t.levels))):
            t.__dict__["rows"] = rows
    return rows


def _call(job: str, struct: ctypes.Structure) -> None:
    if getattr(library(), f"finebits_{job}")(byref(struct), level(), torch.get_num_threads()):
        raise MemoryError(f"finebits {job}: no memory for the working buffers")


def _decode(rows: _Rows, out: Tensor, start: int, stop: int, first: int = 0, last: int | None = None) -> None:
    table = rows.struct if last is None else rows.some(first, last)
    _call("dequantize", _Dequantize(table, out.data_ptr(), start, stop, stop - start, DTYPES[out.dtype]))


def _product(x: Tensor, rows: _Rows, y: Tensor, transposed: bool) -> None:
    """y (*tokens, outputs), contiguous, from x (*tokens, inputs)."""
    s = rows.struct
    inputs, outputs = (s.rows, s.n) if transposed else (s.n, s.rows)
    if y.numel() == 0 or inputs == 0:
        y.zero_()
    elif (tokens := y.numel() // outputs) <= _few(x.dtype):
        x = x.contiguous()
        sizes = tokens, DTYPES[x.dtype], transposed, level(), torch.get_num_threads()
        if library().finebits_product(byref(s), x.data_ptr(), y.data_ptr(), *sizes):
            raise MemoryError("finebits linear: no memory for the working buffers")
    else:
        _by_panels(x.reshape(-1, inputs), rows, y.view(-1, outputs), transposed)


def _few(dtype: torch.dtype) -> float:
    """The largest number of tokens for which the library's own product is faster than decoding panels for torch's (measured)."""
    return _few_at(level(), dtype)


@functools.cache
def _few_at(level: int, dtype: torch.dtype) -> float:
    if LEVELS[level] == "scalar":
        return 4
    return 64 if dtype == torch.bfloat16 and LEVELS[level] == "avx512" and library().finebits_matrix_unit() else math.inf


def _by_panels(x: Tensor, rows: _Rows, y: Tensor, transposed: bool) -> None:
    """Products of float32, whatever x is: torch's of 16 bits take several times as long, where no matrix unit does them."""
    # Panels cut the outputs, never the sum: its partial results would be rounded to y.dtype.
    s = rows.struct
    dtype = x.dtype if library().finebits_matrix_unit() and x.dtype == torch.bfloat16 else torch.float32
    inner, outputs, unit = (s.rows, s.n, 64) if transposed else (s.n, s.rows, 32)
    step = min(outputs, max(8, PANEL_BYTES // (inner * dtype.itemsize) // unit * unit))
    tokens = min(len(x), TOKENS) if x.dtype != dtype else len(x)
    with _panel((step * inner + (0 if x.dtype == dtype else tokens * (inner + step))), dtype) as buffer:
        for a in range(0, outputs, step):
            b = min(a + step, outputs)
            panel = buffer[: (b - a) * inner].view((s.rows, b - a) if transposed else (b - a, s.n))
            if transposed:
                _decode(rows, panel, a, b)
            else:
                _decode(rows, panel, 0, s.n, a, b)
            W = panel if transposed else panel.mT
            if x.dtype == dtype and b - a == outputs:
                torch.mm(x, W, out=y)
            elif x.dtype == dtype:
                y[:, a:b] = x @ W
            else:
                for part, to in zip(x.split(tokens), y.split(tokens)):
                    taken, made = buffer[step * inner :][: len(part) * (inner + b - a)].split([len(part) * inner, len(part) * (b - a)])
                    taken, made = taken.view(len(part), inner).copy_(part), made.view(len(part), b - a)
                    to[:, a:b] = torch.mm(taken, W, out=made)


_kept: dict[str, Tensor] = {}
_kept_lock = threading.Lock()


@contextmanager
def _panel(count: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Scratch of `count` values. One buffer is kept for the process; a second caller at the same time gets one of its own."""
    if not _kept_lock.acquire(blocking=False):
        yield _empty((count,), dtype)
        return
    try:
        nbytes = count * dtype.itemsize
        buffer = _kept.get("panel")
        if buffer is None or buffer.numel() < nbytes:
            _kept.pop("panel", None)
            buffer = _kept["panel"] = _empty((nbytes,), torch.uint8)
        yield buffer[:nbytes].view(dtype)
    finally:
        _kept_lock.release()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes >= LARGE_PAGES_FROM:
        library().finebits_large_pages(out.data_ptr(), out.nbytes)
    return out


def _panels(W: Tensor) -> Iterator[Tensor]:
    """W (*e, m, n) as contiguous matrices of rows, in order."""
    if W.is_contiguous():
        yield W.view(-1, W.shape[-1])
    elif W.ndim > 2:
        for expert in W:
            yield from _panels(expert)
    else:
        step = max(1, PANEL_BYTES // (W.shape[-1] * W.element_size()))
        for rows in W.split(step):
            yield rows.contiguous()


def _differentiable(t: Table) -> bool:
    return torch.is_grad_enabled() and (t.scale.requires_grad or t.levels.requires_grad or t.shift is not None and t.shift.requires_grad)
