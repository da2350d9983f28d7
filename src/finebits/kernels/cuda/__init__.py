"""Triton bodies of the kernel jobs, for NVIDIA GPUs from compute capability 8.0.

`quantize` and `dequantize` agree with the reference to the bit. `linear` takes one of three ways, by the number of tokens and the shape:

- *fragments* (up to 32 tokens in a half precision; n a multiple of 64, blocks of 16): codes go from memory to tensor-core operands
  inside registers. Levels are rounded to x.dtype, products and sums are float32. Where blocks are multiples of 64 and the product is
  not transposed, the scale multiplies the float32 sum of a block; elsewhere it multiplies each weight before the product.
- *lanes* (up to 8 tokens, any block, any dtype): levels and x multiply in float32; where a word holds codes of two blocks, or the
  product is transposed, each weight is first decoded to what `dequantize` gives.
- *dense* (everything else): `dequantize`, then the matrix product of the library.

`grouped` adds the products of rows of different adapters, of every rank, over factors where they lie in pages: two launches a layer.

Sums over splits of a row are taken in a fixed order: the same call on the same machine gives the same bits.

Each file knows those before it: `launch` starts a kernel, `language` holds what Triton's language lacks, `codes` reads packed rows,
`folding` sums splits; `dense` dequantizes, `rounding` quantizes, `lanes` multiplies by codes, `adapters` by factors in pages; `decode` turns
codes into tensor-core operands, `fragments` multiplies by these; `products` chooses the way. Only the files with kernels need Triton.

Costs at the heads of files: bytes are those of memory, where codes are bits / 8 a weight and scales their size / block. Instructions are
what one lane issues for one weight, counted in the loop (in the whole kernel, where it has none) that Triton 3.6 compiles for capability
9.0 from 4,096 columns in blocks of 64 with bf16 scales.
"""

from __future__ import annotations

import functools

import torch

from finebits.kernels.cuda.launch import INTERPRETED

try:
    import triton
except ImportError:
    triton = None
else:
    from finebits.kernels.cuda.adapters import grouped
    from finebits.kernels.cuda.dense import dequantize
    from finebits.kernels.cuda.products import linear
    from finebits.kernels.cuda.rounding import quantize

__all__ = ["INTERPRETED", "available", "dequantize", "grouped", "linear", "name", "quantize", "supports"]

name = "cuda"


@functools.cache
def available() -> str | None:
    if triton is None:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None:
        return "only NVIDIA devices are supported"
    if min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return None


def supports(job: str, device: torch.device, bits: int) -> bool:
    return job not in ("successive", "search") and bits in (2, 3, 4, 8) and (device.type == "cuda" or INTERPRETED)
