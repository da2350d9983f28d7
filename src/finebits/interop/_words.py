"""Codes in 32-bit words, the lowest code in the lowest bits: what integer checkpoints share. For widths that divide 32."""

from __future__ import annotations

import torch
from torch import Tensor

from finebits.errors import Invalid


def to_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 (*r, n) -> int32 (*r, ⌈n·bits/32⌉)."""
    per = 32 // bits
    c = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per)).long().unflatten(-1, (-1, per))
    word = (c << (torch.arange(per, device=c.device) * bits)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).int()


def from_words(words: Tensor, bits: int, n: int) -> Tensor:
    """int32 (*r, ⌈n·bits/32⌉) -> uint8 (*r, n)."""
    c = words.long()[..., None] >> (torch.arange(32 // bits, device=words.device) * bits)
    return (c & (2**bits - 1)).to(torch.uint8).flatten(-2)[..., :n]


def exactly(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """x in a narrower dtype; raises ValueError if that would round it."""
    y = x.to(dtype)
    if not torch.equal(y.float(), x.float()):
        raise Invalid(f"{what} would have to be rounded to {dtype}: quantize with scale='fp16' for this layout")
    return y
