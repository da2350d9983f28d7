"""Native CPU bodies: C compiled by the package's own build, one library for all instruction sets, loaded by ctypes.

The library decodes and encodes whole rows in registers. Products of few tokens run on the packed codes; those of many decode panels of
the weight into bounded scratch buffers and multiply them there, in bfloat16 with AVX-512 and in float32 otherwise. Many tokens are left to
torch without AVX2, and where it has a matrix unit for bfloat16.
Nothing is repacked or cached for a weight.
FINEBITS_CPU=avx512, avx2 or scalar holds the library to that instruction set.

Results do not depend on the number of threads, nor on what ran before.

Each file knows those before it: `binding` loads the library, `buffers` has memory for results, `rows` hands packed weights over, `rounding`,
`products`, `adapters` and `paged` are the jobs. The C is in kernels/native.
"""

from __future__ import annotations

import torch

from finebits.kernels.cpu.adapters import grouped
from finebits.kernels.cpu.binding import LEVELS, available, level
from finebits.kernels.cpu.buffers import placed
from finebits.kernels.cpu.products import dequantize, linear
from finebits.kernels.cpu.rounding import quantize, search, successive

__all__ = [
    "LEVELS",
    "available",
    "dequantize",
    "grouped",
    "level",
    "linear",
    "name",
    "placed",
    "quantize",
    "search",
    "successive",
    "supports",
]

name = "cpu"


def supports(job: str, device: torch.device, bits: int) -> bool:
    return device.type == "cpu" and 1 <= bits <= 8
