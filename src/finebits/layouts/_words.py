"""Codes in 32-bit words, the lowest code in the lowest bits: what integer checkpoints share. 32 codes of a width that does not divide 32 fill
as many words as they have bits, and some lie in two."""

from __future__ import annotations

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats.base import SLAB


def to_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 (*r, n) -> int32 (*r, ⌈n·bits/32⌉)."""
    if 32 % bits:
        bit = (codes[..., None] >> torch.arange(bits, device=codes.device, dtype=torch.uint8)) & 1
        return to_words(bit.flatten(-2), 1)
    per = 32 // bits
    c = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    shift = torch.arange(per, device=c.device, dtype=torch.int32) * bits
    words = torch.empty(c.shape[:-1], dtype=torch.int32, device=c.device)
    rows = max(1, SLAB // max(c[:1].numel(), 1))  # what is wide on the way stays small
    for out, chunk in zip(words.split(rows), c.split(rows), strict=True):
        out.copy_((chunk.int() << shift).sum(-1, dtype=torch.int32))  # the parts share no bit: the sum has no carry, and the sign its own
    return words


def from_words(words: Tensor, bits: int, n: int) -> Tensor:
    """int32 (*r, ⌈n·bits/32⌉) -> uint8 (*r, n)."""
    if 32 % bits:
        bit = from_words(words, 1, n * bits).unflatten(-1, (n, bits))
        return (bit << torch.arange(bits, device=words.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    c = words.long()[..., None] >> (torch.arange(32 // bits, device=words.device) * bits)
    return (c & (2**bits - 1)).to(torch.uint8).flatten(-2)[..., :n]


def mapped(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes], without an index of eight bytes a code."""
    out = torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
    for to, chunk in zip(out.view(-1).split(SLAB), codes.reshape(-1).split(SLAB), strict=True):
        to.copy_(table[chunk.int()])
    return out


def exactly(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """x in a narrower dtype; raises ValueError if that would round it."""
    y = x.to(dtype)
    if not torch.equal(y.float(), x.float()):
        raise Invalid(f"{what} would have to be rounded to {dtype}: quantize with scale='fp16' for this layout")
    return y
