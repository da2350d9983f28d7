"""Numbers of one bit, or two, that stand for weights in training: how they are computed with, how a file holds them and gives them back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finebits.adapters.base import Params
from finebits.blocks import pack, unpack
from finebits.errors import Invalid
from finebits.formats._medians import medians
from finebits.formats.base import level_tensor

LEVELS = {bits: medians(bits) for bits in (1, 2)}
STEPS = 2**12


def check_bits(bits: int) -> None:
    """Raise where there is no grid of so many bits."""
    if bits not in LEVELS:
        raise Invalid(f"bits is {bits}; it can be 1 or 2")


def packed(p: Params, bits: int) -> Params:
    """Codes of a factor in bytes, and its μ and σ: numbers that are off the mark by less than half a step of them give the same again."""
    out = Params()
    for k, w in p.items():
        code, _, mean, sigma = _seen(w.detach().float(), bits)
        held = {f"{k}_codes": pack(code.to(torch.uint8).view(1, -1), bits)[0], f"{k}_at": torch.stack([mean, sigma]).detach()}
        same = torch.equal(coarse(_found(held, k, w.shape, bits), bits), coarse(w, bits))
        out |= held if same else {k: w}  # of two bits, where hardly any are in the outer cells
    return out


def unpacked(p: Params, shapes: Mapping[str, Sequence[int]], bits: int) -> Params:
    """Factors of these shapes that are computed with as those were that a file holds."""
    return {k: _found(p, k, shapes[k], bits) if f"{k}_codes" in p else p[k] for k in shapes if k in p or f"{k}_codes" in p}


def _found(p: Params, k: str, shape: Sequence[int], bits: int) -> Tensor:
    """Weights of these codes whose mean and deviation are μ and σ."""
    code = unpack(p[f"{k}_codes"][None], bits, math.prod(shape))
    c, (mean, sigma) = level_tensor(LEVELS[bits], code.device)[code.long()].double(), p[f"{k}_at"].double()
    spread = c.std() if c.numel() > 1 else c.new_zeros(())
    return (mean + torch.where(spread > 0, sigma / spread, 0.0) * (c - c.mean())).float().view(*shape)


def coarse(w: Tensor, bits: int) -> Tensor:
    """ŵ in float32, with the gradient of the paper.

    >>> coarse(torch.tensor([-2.0, -1.0, 1.0, 2.0]), 1)  # σ = 1.8257
    tensor([-1.2314, -1.2314,  1.2314,  1.2314])
    """
    code, v, mean, sigma = _seen(w.float(), bits)
    value = level_tensor(LEVELS[bits], w.device)[code]
    return (v + (value - v).detach()) * sigma + mean


def _seen(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, standardised weights, and μ and σ as they are computed with."""
    mean, sigma = w.mean(), w.std() if w.numel() > 1 else w.new_zeros(())
    v = (w - mean) / (sigma + 1e-5)
    levels = level_tensor(LEVELS[bits], w.device)
    code = torch.bucketize(v.detach(), (levels[1:] + levels[:-1]) / 2)
    with torch.no_grad():
        fraction, exponent = torch.frexp(sigma)
        rounded = torch.ldexp((fraction * STEPS).round() / STEPS, exponent)
        step = rounded / STEPS
        near = torch.where(step > 0, (mean / torch.where(step > 0, step, 1.0)).round() * step, mean)
    return code, v, mean + (near - mean).detach(), sigma + (rounded - sigma).detach()
