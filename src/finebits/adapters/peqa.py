"""PEQA: Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization.  Kim et al., NeurIPS 2023.
Use it where a model in integers is to be tuned, served as it is, and switched between tasks: scales alone are trained, so that it learns a
domain and no large shift.

    Ŵ = (Δ₀ + ΔΔ) · (q̄ − z₀)

Codes q̄ and zero points z₀ stay; the gradient of a scale is Σ G ∘ (q̄ − z₀) over its block, and no weight asks for one. With one scale a row it
is had from the outputs: Σ_t g ∘ (X (q̄ − z₀)ᵀ).
Deviations: what is trained is δ with Δ = Δ₀ e^δ, so that no scale changes its sign or collapses, and a rate means the same for all. A real
minimum, where the base has one, stays. Groups are those of the base (`block`); the paper's main rows have one scale a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._codes import Coded, block_of, per_row, wide
from finebits.adapters._rows import some, tiles
from finebits.adapters.base import Layer, Params, complete
from finebits.formats.base import Format
from finebits.formats.int import Int
from finebits.qtensor import QTensor, times


@dataclass(frozen=True)
class PEQA(Coded):
    """The scales of a weight in integers, whose blocks have `block` columns ("row": one scale a row).

    >>> q = fb.quantize(torch.tensor([[7.0, 1.2], [0.0, 7.0]]), fb.Int(4, block="row"))
    >>> tuned = fb.PEQA("row").coded({"delta": torch.tensor([[0.0], [2.0]]).log1p()}, q)
    >>> tuned.dequantize(), torch.equal(tuned.parts["codes"], q.parts["codes"])
    (tensor([[ 7.,  1.],
            [ 0., 21.]]), True)
    """

    block: int | str = 64
    rank: ClassVar[int] = 0
    kept: ClassVar[frozenset[str]] = frozenset({"delta"})

    @property
    def candidates(self) -> tuple[Format | None, ...]:
        return tuple(Int(bits, self.block, scale="bf16") for bits in (2, 3, 4))

    def served(self, format: Format | None) -> Format:
        return block_of("PEQA", format, self.block, "scales")

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"delta": (m, per_row(self.block, n))}

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        return complete({k: torch.zeros(s) for k, s in self.shapes(*self.under(base).shape).items()}, start, "PEQA")

    def coded(self, p: Params, W: Float[Tensor, "m n"]) -> QTensor:
        q = cast(QTensor, W)
        scale = q.parts["scale"]
        return QTensor(q.parts | {"scale": (scale.float() * p["delta"].exp()).to(scale.dtype)}, q.format, q.sizes, q.dtype)

    def gradients(self, p: Params, x: Tensor, g: Float[Tensor, "t m"], W: Tensor, made: Tensor) -> Params:
        (m, n), dtype, delta = W.shape, wide(x), p["delta"]
        low = made.parts.get("shift") if isinstance(made, QTensor) else None
        if self.block == "row":
            y = times(x, made).to(dtype)
            if low is not None:
                y -= x.to(dtype).sum(-1, keepdim=True) * low.to(dtype).mT
            return {"delta": (g.to(dtype) * y).sum(0)[:, None].to(delta.dtype)}
        format, found = Int(block=self.block), torch.empty_like(delta)
        for rows in tiles(m, n):
            w = some(made, rows, dtype)
            if low is not None:
                w = w - format.spread(low[rows].to(dtype), n)
            found[rows] = format.cut(g[:, rows].to(dtype).mT @ x.to(dtype) * w).sum(-1).to(delta.dtype)
        return {"delta": found}
