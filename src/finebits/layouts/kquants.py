"""GGUF's super-blocks, to the bit: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K <-> 256 integers, the integer scales of their groups, and float16 steps.

    Q2_K   d·s·q − e·m         16 groups of 16, 4 bits of s and m     84 bytes: (s, m), q, d, e
    Q3_K   d·s·(q − 4)         16 groups of 16, 6 bits of s          110 bytes: q's high bit, its 2 low bits, s + 32, d
    Q4_K   d·s·q − e·m          8 groups of 32, 6 bits of s and m    144 bytes: d, e, (s, m), q
    Q5_K   d·s·q − e·m          8 groups of 32, 6 bits of s and m    176 bytes: d, e, (s, m), q's high bit, its 4 low bits
    Q6_K   d·s·(q − 32)        16 groups of 16, 8 bits of s          210 bytes: q's 4 low bits, its 2 high bits, s, d

Bits of several weights share a byte in planes: byte l of a stride holds weight l, l + stride, l + 2·stride … from its low bits upwards.
Products and the difference are taken in float32 in the order above, as ggml takes them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finebits.errors import Invalid

SUPER = 256


class Kind(NamedTuple):
    """What a type of super-block can say: codes low … high, groups of `group` weights, scales from `least` to `most` steps, minima up to
    `deepest` steps (0: none), in `size` bytes."""

    low: int
    high: int
    group: int
    least: int
    most: int
    deepest: int
    size: int
    floor: float = 0.0


KINDS = {
    "Q2_K": Kind(0, 3, 16, 0, 15, 15, 84),
    "Q3_K": Kind(-4, 3, 16, -32, 31, 0, 110),
    "Q4_K": Kind(0, 15, 32, 0, 63, 63, 144),
    "Q5_K": Kind(0, 31, 32, 0, 63, 63, 176),
    "Q6_K": Kind(-32, 31, 16, -128, 127, 0, 210),
}


class Supers(NamedTuple):
    """k super-blocks: codes (k, groups, group), scales and minima in steps (k, groups), float16 steps d and e (k, 1); integers are int16."""

    codes: Tensor
    scales: Tensor
    d: Tensor
    minima: Tensor | None = None
    e: Tensor | None = None

    def values(self) -> Tensor:
        """The weights (k, groups, group), in float32.

        >>> one = torch.ones(1, 16, dtype=torch.int16)
        >>> Supers(3 * one[..., None].expand(1, 16, 16), 2 * one, torch.tensor([[0.5]]).half()).values().unique()
        tensor([3.])
        """
        scaled = (self.d.float() * self.scales)[..., None] * self.codes
        return scaled if self.minima is None or self.e is None else scaled - (self.e.float() * self.minima)[..., None]


def to_bytes(s: Supers, kind: str) -> Tensor:
    """uint8 (k, size).

    >>> from_bytes(torch.zeros(1, 144, dtype=torch.uint8), "Q4_K").codes.shape
    torch.Size([1, 8, 32])
    """
    q = (s.codes - KINDS[kind].low).flatten(-2).to(torch.uint8)
    heads = [x.contiguous().view(torch.uint8) for x in (s.d, s.e) if x is not None]
    if s.minima is None:
        if kind == "Q6_K":
            return torch.cat([_plane(q & 15, 4, 64), _plane(q >> 4, 2, 32), s.scales.to(torch.int8).view(torch.uint8), *heads], -1)
        shifted = (s.scales + 32).to(torch.uint8)
        scales = [_plane(shifted & 15, 4, 8), _plane(shifted >> 4, 2, 4)]
        return torch.cat([_plane(q >> 2, 1, 32), _plane(q & 3, 2, 32), *scales, *heads], -1)
    a, b = s.scales.to(torch.uint8), s.minima.to(torch.uint8)
    if kind == "Q2_K":
        return torch.cat([a | b << 4, _plane(q, 2, 32), *heads], -1)
    low = [x[:, :4] | x[:, 4:] >> 4 << 6 for x in (a, b)]
    scales = [*low, a[:, 4:] & 15 | b[:, 4:] << 4]
    body = [_plane(q & 15, 4, 32)] if kind == "Q4_K" else [_plane(q >> 4, 1, 32), _plane(q & 15, 4, 32)]
    return torch.cat([*heads, *scales, *body], -1)


def from_bytes(data: Tensor, kind: str) -> Supers:
    """The inverse of `to_bytes`.

    >>> data = torch.randint(256, (3, 110), dtype=torch.uint8)
    >>> torch.equal(to_bytes(from_bytes(data, "Q3_K"), "Q3_K"), data)
    True
    """
    k, take = KINDS[kind], lambda *sizes: data.split(sizes, -1)  # noqa: E731
    minima = e = None
    if kind == "Q2_K":
        ab, qs, d, e = take(16, 64, 2, 2)
        q, scales, minima = _planes(qs, 2, 32), ab & 15, ab >> 4
    elif kind == "Q3_K":
        high, qs, low, top, d = take(32, 64, 8, 4, 2)
        q = _planes(qs, 2, 32) | _planes(high, 1, 32) << 2
        scales = (_planes(low, 4, 8) | _planes(top, 2, 4) << 4).to(torch.int16) - 32
    elif kind == "Q6_K":
        qs, high, scales, d = take(128, 64, 16, 2)
        q, scales = _planes(qs, 4, 64) | _planes(high, 2, 32) << 4, scales.contiguous().view(torch.int8)
    else:
        d, e, a, b, ab, *high, qs = take(2, 2, 4, 4, 4, *([32] if kind == "Q5_K" else []), 128)
        q = _planes(qs, 4, 32) | (_planes(high[0], 1, 32) << 4 if high else 0)
        scales, minima = torch.cat([a & 63, ab & 15 | a >> 6 << 4], -1), torch.cat([b & 63, ab >> 4 | b >> 6 << 4], -1)
    halves = lambda x: None if x is None else x.contiguous().view(torch.float16)  # noqa: E731
    codes = q.to(torch.int16).unflatten(-1, (-1, k.group)) + k.low
    half = halves(d)
    assert half is not None
    return Supers(codes, scales.to(torch.int16), half, None if minima is None else minima.to(torch.int16), halves(e))


def decode(data: np.ndarray, kind: str) -> Tensor:
    """Bytes (*e, m, n/256·size) of a tensor of GGUF -> float32 (*e, m, n).

    >>> decode(np.zeros((2, 420), np.uint8), "Q6_K").shape
    torch.Size([2, 512])
    """
    if kind not in KINDS:
        raise Invalid(f"super-blocks are {', '.join(KINDS)}; this tensor is {kind}")
    rows = torch.from_numpy(np.array(data, dtype=np.uint8)).unflatten(-1, (-1, KINDS[kind].size))
    return from_bytes(rows.flatten(0, -2), kind).values().reshape(*rows.shape[:-2], -1)


def _plane(c: Tensor, bits: int, stride: int) -> Tensor:
    """Numbers of `bits` bits (k, c) -> bytes (k, c·bits/8)."""
    parts = c.unflatten(-1, (-1, 8 // bits, stride)) << (torch.arange(8 // bits, dtype=torch.uint8) * bits)[:, None]
    return parts.sum(-2, dtype=torch.uint8).flatten(-2)


def _planes(data: Tensor, bits: int, stride: int) -> Tensor:
    """The inverse of `_plane`."""
    parts = data.unflatten(-1, (-1, 1, stride)) >> (torch.arange(8 // bits, dtype=torch.uint8) * bits)[:, None]
    return (parts & (2**bits - 1)).flatten(-3)
