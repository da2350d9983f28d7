"""A chain of jobs over buffers that stay where they are, done by one call: native/step and dispatch.c.

One token of a small model takes some five hundred products, norms and sums, each of a few microseconds: from Python, calling them takes
longer than they do. Every method adds one to the chain; tensors are float32 and contiguous, a row for each request, and are kept while the
program is.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.kernels.cpu.adapters import Grouped, described
from finebits.kernels.cpu.binding import DTYPES, Packed, available, level, library
from finebits.kernels.cpu.paged import Paged
from finebits.kernels.cpu.rows import rows_of
from finebits.kernels.table import Table

KINDS = ("product", "low_rank", "dense", "norm", "rotate", "keep", "attend", "gate", "add")
ACTS = ("silu", "gelu", "gelu_tanh", "relu")


def _structure(name: str, pointers: str, sizes: str = "", *more: tuple[str, Any]) -> type[ctypes.Structure]:
    fields = [*((k, c_void_p) for k in pointers.split()), *((k, c_int64) for k in sizes.split()), *more]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


class Linear(ctypes.Structure):
    _fields_ = [
        ("t", Packed),
        ("x", c_void_p),
        ("y", c_void_p),
        ("tokens", c_int64),
        *((k, c_int32) for k in ("dtype", "transposed", "near")),
    ]


Norm = _structure("Norm", "x y weight", "rows n", ("eps", c_float))
Rotate = _structure("Rotate", "x cos sin length", "requests heads width turned")
Keep = _structure("Keep", "k v to")
Gate = _structure("Gate", "g u y", "rows n pitch", ("act", c_int32))
Add = _structure("Add", "x y", "rows n pitch")
Dense = _structure("Dense", "w x y", "tokens m n", ("dtype", c_int32))
Part = _structure("Part", "", "kind", ("job", c_void_p))


@functools.cache
def body() -> Any:
    """The library's function; None where there is no library, or one that was compiled before it had this."""
    found = getattr(library(), "finebits_program", None) if available() is None else None
    if found is not None:
        found.argtypes, found.restype = (c_void_p, c_int64, c_int, c_int), c_int
    return found


class Program:
    """Jobs, and what they read and write.

    >>> program, x, y = Program(), torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    >>> program.norm(x, y, torch.ones(2), 0.0)
    >>> program.parts
    ['norm']
    """

    def __init__(self) -> None:
        self.parts = list[str]()
        self._jobs, self._kept, self._chain = list[ctypes.Structure](), list[Any](), None

    def run(self) -> None:
        """All of them, in order."""
        if self._chain is None:
            self._chain = (Part * len(self.parts))(
                *(Part(KINDS.index(k), ctypes.addressof(j)) for k, j in zip(self.parts, self._jobs, strict=True))
            )
        if body()(byref(self._chain), len(self.parts), level(), torch.get_num_threads()):
            raise MemoryError("finebits program: no memory for the working buffers")

    def _add(self, kind: str, job: ctypes.Structure, *kept: Any) -> None:
        for t in kept:
            if isinstance(t, Tensor) and not (t.is_cpu and t.is_contiguous()):
                raise Invalid(f"{kind}: a tensor {tuple(t.shape)} on {t.device} does not lie together on the CPU")
        self.parts.append(kind)
        self._jobs.append(job)
        self._kept.append(kept)
        self._chain = None

    def product(self, x: Tensor, W: Table, y: Tensor, near: bool) -> None:
        """y (b, m) = x (b, n) Wᵀ, packed; `near`: x may be rounded as far as 16 bits would be."""
        rows = rows_of(W)
        job = Linear(rows.struct, x.data_ptr(), y.data_ptr(), len(x), DTYPES[x.dtype], False, near)
        self._add("product", job, x, y, rows)

    def low_rank(self, x: Tensor, y: Tensor, L: Tensor, R: Tensor) -> None:
        """y (b, m) += x (b, n) Rᵀ Lᵀ, of L (m, r) and R (r, n)."""
        columns = L.mT.contiguous()
        laid = described([R], [columns], 1.0)
        group = array("Q", [0, len(x), laid.buffer_info()[0]])
        job = Grouped(x.data_ptr(), y.data_ptr(), group.buffer_info()[0], 1, len(x), x.shape[1], y.shape[1], len(R))
        self._add("low_rank", job, x, y, R, columns, laid, group)

    def dense(self, x: Tensor, W: Tensor, y: Tensor) -> None:
        """y (b, m) = x (b, n) Wᵀ, W in any of the kernels' dtypes."""
        job = Dense(W.data_ptr(), x.data_ptr(), y.data_ptr(), len(x), *W.shape, DTYPES[W.dtype])
        self._add("dense", job, x, y, W)

    def norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> None:
        """y = RMSNorm(x) over groups of as many numbers as `weight` has; y may be x."""
        n = weight.numel()
        self._add("norm", Norm(x.data_ptr(), y.data_ptr(), weight.data_ptr(), x.numel() // n, n, eps), x, y, weight)

    def rotate(self, x: Tensor, heads: int, cos: Tensor, sin: Tensor, lengths: Tensor) -> None:
        """The heads of x (b, heads · width) by cos and sin (positions, turned) of position lengths − 1, in place."""
        job = Rotate(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), lengths.data_ptr(), len(x), heads, x.shape[1] // heads, cos.shape[1])
        self._add("rotate", job, x, cos, sin, lengths)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, store: Tensor, table: Tensor, lengths: Tensor, heads: int, scale: float
    ) -> None:
        """k and v go where the last token of each request is, and `out` is q over all its tokens: kernels.cpu.paged has the shapes."""
        _, _, tokens, kv, width = store.shape
        addresses = (t.data_ptr() for t in (q, store, table, lengths, out))
        job = Paged(*addresses, len(q), heads, kv, width, tokens, table.shape[1], store.stride(0), 0, scale)
        self._add("keep", Keep(k.data_ptr(), v.data_ptr(), ctypes.addressof(job)), k, v, job)
        self._add("attend", job, q, store, table, lengths, out)

    def gate(self, g: Tensor, u: Tensor | None, y: Tensor, act: str) -> None:
        """y (b, n) = act(g) u, where g and u may be parts of wider rows; without u act(g)."""
        at = None if u is None else u.data_ptr()
        self._add("gate", Gate(g.data_ptr(), at, y.data_ptr(), *y.shape, g.stride(0), ACTS.index(act)), y)
        self._kept.append((g, u))

    def add(self, x: Tensor, y: Tensor) -> None:
        """y (b, n) += x (b, n), or (n,)."""
        self._add("add", Add(x.data_ptr(), y.data_ptr(), *y.shape, 0 if x.ndim == 1 else x.shape[1]), x, y)
