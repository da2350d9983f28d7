"""llama.cpp's product with a Q4_0 weight, called through ggml's C functions as they lie in a package that is installed (llama-cpp-python,
pywhispercpp): a peer of benchmarks/linear.py.

A graph of one matrix product is computed again and again over inputs that are copied in; threads are those of torch.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

F32, Q4_0, BLOCK, BLOCK_BYTES = 0, 2, 32, 18
PACKAGES = ("llama-cpp-python", "pywhispercpp")
GRAPH_BYTES = 4 << 20  # of descriptions and of the graph itself


class _Params(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Library:
    """The functions, found in the libraries of the first package that has them."""

    def __init__(self) -> None:
        self.parts = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in _paths()]
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self.init = self._named("ggml_init", pointer, [_Params])
        self.new_tensor = self._named("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, whole, whole])
        self.mul_mat = self._named("ggml_mul_mat", pointer, [pointer, pointer, pointer])
        self.new_graph = self._named("ggml_new_graph", pointer, [pointer])
        self.expand = self._named("ggml_build_forward_expand", None, [pointer, pointer])
        self.data = self._named("ggml_get_data", pointer, [pointer])
        self.quantize = self._named("ggml_quantize_chunk", ctypes.c_size_t, [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer])
        self.compute = self._named("ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int])
        self.free = self._named("ggml_free", None, [pointer])
        self._named("ggml_cpu_init", None, [])()

    def _named(self, name: str, result: type | None, arguments: Sequence[type]) -> ctypes._NamedFuncPointer:
        function = next(getattr(part, name) for part in self.parts if hasattr(part, name))
        function.restype, function.argtypes = result, list(arguments)
        return function


def _paths() -> list[Path]:
    """What the libraries need first: OpenMP, then ggml's base, then its CPU part."""
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        libraries = [Path(str(f.locate())) for f in files if ".so" in f.name]
        found = [
            next((f for f in sorted(libraries, reverse=True) if f.name.startswith(part)), None)
            for part in ("libgomp", "libggml-base", "libggml-cpu")
        ]
        if found[1] and found[2]:
            return [f for f in found if f]
    raise ImportError(f"none of {', '.join(PACKAGES)} is installed, or none has ggml as a library of its own")


_library: _Library | None = None


class Q4(nn.Module):
    """x Wᵀ with W in Q4_0 (blocks of 32, a float16 scale each: 4.5 bits), float32 in and out.

    Raises ImportError where no package has ggml.
    """

    def __init__(self, W: Tensor, tokens: int) -> None:
        super().__init__()
        global _library
        self.library = _library = _library or _Library()
        m, n = W.shape
        self.shape = tokens, m
        size = GRAPH_BYTES + m * n // BLOCK * BLOCK_BYTES + 4 * tokens * (3 * n + m)
        self.context = self.library.init(_Params(size, None, False))
        weight, self.x = self.library.new_tensor(self.context, Q4_0, n, m), self.library.new_tensor(self.context, F32, n, tokens)
        self.y = self.library.mul_mat(self.context, weight, self.x)
        self.graph = self.library.new_graph(self.context)
        self.library.expand(self.graph, self.y)
        W = W.float().contiguous()
        self.library.quantize(Q4_0, W.data_ptr(), self.library.data(weight), 0, m, n, None)

    def forward(self, x: Tensor) -> Tensor:
        ctypes.memmove(self.library.data(self.x), x.contiguous().data_ptr(), x.nbytes)
        if self.library.compute(self.context, self.graph, torch.get_num_threads()):
            raise RuntimeError("ggml could not compute the product")
        y = torch.empty(self.shape)
        ctypes.memmove(y.data_ptr(), self.library.data(self.y), y.nbytes)
        return y

    def __del__(self) -> None:
        self.library.free(self.context)
