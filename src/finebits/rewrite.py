"""A weight in codes that is made to hold other values, in place: what training it takes. Rounding up or down by chance has no bias."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.blocks import pack
from finebits.errors import Invalid
from finebits.formats.base import Format, Scales, by_rows, level_tensor
from finebits.qtensor import QTensor


def rewrite(q: QTensor, W: Float[Tensor, "m n"], gen: torch.Generator | None = None) -> None:
    """Make `q` hold W, with scales that suit it, in place. With a generator every weight goes to one of the two levels around it, to the nearer
    one more often: the mean of what is held is W, but where a scale is rounded so that W leaves its levels. Without one, to the nearest.

    Source: Q-GaLore (arXiv:2407.08296v1, section 3.3), for any format whose codes are one a weight.

    >>> q = fb.quantize(torch.tensor([[7.0, 1.0]]), fb.Int(4))
    >>> rewrite(q, torch.tensor([[7.0, 1.3]]))
    >>> q.dequantize()
    tensor([[7., 1.]])
    >>> gen = torch.Generator().manual_seed(0)
    >>> seen = [(rewrite(q, torch.tensor([[7.0, 1.3]]), gen), q.dequantize()[0, 1].item())[1] for _ in range(1000)]
    >>> sorted(set(seen)), round(sum(seen) / 1000, 1)
    ([1.0, 2.0], 1.3)
    """
    format, n = q.format, W.shape[-1]
    check(format)
    W = W.float()
    fitted = format.hold(format.spanning(W) if format.block == "tensor" else Scales(*by_rows(format.spanning, W)), W)
    scales = format.scales(fitted, n)
    codes = (
        format.packed(W, scales) if gen is None else by_rows(functools.partial(_by_chance, format, gen), W, scales.scale, scales.shift)[0]
    )
    for k, part in ({"codes": codes} | fitted).items():
        q.parts[k].copy_(part)


def check(format: Format) -> None:
    """Raise where weights in this format cannot be written anew and anew.

    >>> check(fb.Ternary())
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: Ternary finds its scales from averages, which shrink each time a weight is written back: train it as int, nf or fp
    """
    who = type(format).__name__
    if format.row_codes(4096) != 4096:
        raise Invalid(f"{who} holds several weights in a code, and none of them moves alone: train another format")
    if not format.still:
        raise Invalid(f"{who} finds its scales from averages, which shrink each time a weight is written back: train it as int, nf or fp")


def _by_chance(format: Format, gen: torch.Generator, W: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor]:
    """Packed codes of rows, each weight at one of the two levels around it."""
    n = W.shape[-1]
    levels, rank = level_tensor(format.levels(), W.device).sort(stable=True)
    levels, rank = levels[kept := torch.cat([levels.new_ones(1).bool(), levels[1:] > levels[:-1]])], rank[kept]  # of equal ones, the first
    s = format.spread(scale.float(), n)
    u = W if shift is None else W - format.spread(shift.float(), n)
    u = torch.where(s != 0, u / s, 0.0).clamp(levels[0], levels[-1])
    low = (torch.searchsorted(levels, u.contiguous(), right=True) - 1).clamp(0, len(levels) - 2)
    share = (u - levels[low]) / (levels[low + 1] - levels[low])
    up = torch.rand(u.shape, generator=gen, device="cpu" if gen.device.type == "cpu" else u.device).to(u.device) < share
    return (pack(rank[low + up.long()].to(torch.uint8), format.bits),)
