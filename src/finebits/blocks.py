"""Rows cut into blocks, and codes packed into bytes.

A row of n codes of b bits is stored as *planes*: b is written as a sum of the widths 8, 4, 2, 1 (3 = 2 + 1, 6 = 4 + 2), the first
plane holds the lowest bits of every code, the next plane the bits above. Inside a plane of width w, column c lies in byte c·w // 8 at
bit c·w mod 8 (little-endian), and the plane ends on a whole byte. The planes of a row follow one another, so a row takes
Σ ⌈n·w / 8⌉ bytes and rows can be cut apart without touching their neighbours.
"""

from __future__ import annotations

import functools

from jaxtyping import Shaped, UInt8
from torch import Tensor, arange, cat
from torch.nn.functional import pad

from finebits.errors import Invalid


def widths(bits: int) -> tuple[int, ...]:
    """Plane widths of a code of `bits` bits, lowest plane first: 3 -> (2, 1), 7 -> (4, 2, 1).

    >>> widths(4), widths(3), widths(7)
    ((4,), (2, 1), (4, 2, 1))
    """
    if not 1 <= bits <= 8:
        raise Invalid(f"codes have 1 to 8 bits, not {bits}")
    return tuple(w for w in (8, 4, 2, 1) if bits & w)


@functools.cache
def row_bytes(n: int, bits: int) -> int:
    """Bytes that one row of n codes takes, padding included.

    >>> row_bytes(10, 3)  # 20 bits and 10 bits, each to whole bytes
    5
    """
    return sum(-(-n * w // 8) for w in widths(bits))


def n_blocks(n: int, block: int) -> int:
    """Blocks in a row of n columns; the last one may be short.

    >>> n_blocks(100, 64)
    2
    """
    return -(-n // block)


def pack(codes: UInt8[Tensor, "*r n"], bits: int) -> UInt8[Tensor, "*r bytes"]:
    """Codes (one a byte) -> packed rows.

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)  # 1 + 16 · 2, and 3
    tensor([[33, 3]], dtype=torch.uint8)
    """
    n, planes, shift = codes.shape[-1], [], 0
    for w in widths(bits):
        per = 8 // w
        part = (codes >> shift) & ((1 << w) - 1)
        part = pad(part, (0, -n % per)).unflatten(-1, (-1, per))
        planes.append((part << (arange(per, device=codes.device) * w).to(codes.dtype)).sum(-1, dtype=codes.dtype))
        shift += w
    return planes[0].contiguous() if len(planes) == 1 else cat(planes, -1)


def unpack(packed: UInt8[Tensor, "*r bytes"], bits: int, n: int) -> UInt8[Tensor, "*r n"]:
    """Packed rows -> codes, one a byte: the inverse of `pack`.

    >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), 4, 3)
    tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    codes, start, shift = None, 0, 0
    for w in widths(bits):
        per, size = 8 // w, -(-n * w // 8)
        plane = packed[..., start : start + size, None]
        part = (plane >> (arange(per, device=packed.device) * w).to(packed.dtype)) & ((1 << w) - 1)
        part = part.flatten(-2)[..., :n] << shift
        codes = part if codes is None else codes | part
        start, shift = start + size, shift + w
    assert codes is not None
    return codes


def cut(w: Shaped[Tensor, "*r n"], block: int, fill: float = 0.0) -> Shaped[Tensor, "*r k block"]:
    """Rows -> blocks along the last dimension; a short last block is filled up.

    >>> cut(torch.tensor([[1, 2, 3, 4, 5]]), 3)
    tensor([[[1, 2, 3], [4, 5, 0]]])
    """
    return pad(w, (0, -w.shape[-1] % block), value=fill).unflatten(-1, (-1, block))


def join(blocks: Shaped[Tensor, "*r k block"], n: int) -> Shaped[Tensor, "*r n"]:
    """Blocks -> rows of n columns: the inverse of `cut`.

    >>> join(torch.tensor([[[1, 2, 3], [4, 5, 0]]]), 5)
    tensor([[1, 2, 3, 4, 5]])
    """
    return blocks.flatten(-2)[..., :n]


def spread(per_block: Shaped[Tensor, "*r k"], block: int, n: int) -> Shaped[Tensor, "*r n"]:
    """One value a block -> one value a column.

    >>> spread(torch.tensor([[10, 20]]), 3, 5)
    tensor([[10, 10, 10, 20, 20]])
    """
    if per_block.shape[-1] == 1:
        return per_block.expand(*per_block.shape[:-1], n)
    return per_block.repeat_interleave(block, -1)[..., :n]
