"""QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models.  Xu et al., ICLR 2024.
Use it where a model in integers with real minima is to be tuned and served as it is (GGUF's Q4_1): more is learned than by scales alone.

    y = x Ŵᵀ + s · pool(x) Aᵀ Bᵀ,    pool: the sum over every block of inputs,    A ∈ ℝ^{r×k},  B ∈ ℝ^{m×r},  s = α/r

A has one column a block, so that the product is constant inside of blocks and goes into their minima, which are real: l′ = l + s·B A. Codes and
scales stay.
Deviations: l′ is rounded to what it is held in as it is used, so that what is trained is what is served.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._codes import Coded, block_of, per_row, uncast, wide
from finebits.adapters.base import Layer, Params, check_scale, complete
from finebits.blocks import cut
from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.formats.int import Int
from finebits.qtensor import QTensor


@dataclass(frozen=True)
class QALoRA(Coded):
    """A low-rank update of the minima of blocks of `block` columns.

    >>> q = fb.quantize(torch.tensor([[0.0, 15.0]]), fb.Int(4, block=32, symmetric=False))
    >>> fb.QALoRA(rank=1, alpha=1).merged({"A": torch.tensor([[1.0]]), "B": torch.tensor([[2.0]])}, q)
    tensor([[ 2., 17.]])
    """

    rank: int = 16
    alpha: float = 16.0
    block: int = 32
    kept: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def __post_init__(self) -> None:
        check_scale(self.rank, self.alpha)

    @property
    def s(self) -> float:
        """The factor in front of the product: α/r."""
        return self.alpha / self.rank

    @property
    def candidates(self) -> tuple[Format | None, ...]:
        return tuple(Int(bits, self.block, False, "fp16") for bits in (2, 3, 4))

    def served(self, format: Format | None) -> Format:
        own = block_of("QALoRA", format, self.block, "minima")
        if own.form != "real":
            raise Invalid(f"QALoRA moves real minima of blocks, and {own} has none: quantize it as int with symmetric: false")
        return own

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, per_row(self.block, n)), "B": (m, self.rank)}

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = self.under(base).shape
        A = (torch.rand(self.rank, per_row(self.block, n), generator=gen) * 2 - 1) / math.sqrt(n)
        return complete({"A": A, "B": torch.zeros(m, self.rank)}, start, "QALoRA")

    def coded(self, p: Params, W: Float[Tensor, "m n"]) -> QTensor:
        q = cast(QTensor, W)
        low = q.parts["shift"]
        with uncast(low):
            shift = (low.float() + self.s * p["B"] @ p["A"]).to(low.dtype)
        return QTensor(q.parts | {"shift": shift}, q.format, q.sizes, q.dtype)

    def keep(self, x: Float[Tensor, "t n"]) -> Float[Tensor, "t k"]:
        """Sums over blocks."""
        return cut(x, self.block).sum(-1, dtype=wide(x))

    def gradients(self, p: Params, x: Float[Tensor, "t k"], g: Float[Tensor, "t m"], W: Tensor, made: Tensor) -> Params:
        D = g.to(x.dtype).mT @ x  # (m, k), of the minima
        found = {"A": self.s * p["B"].to(x.dtype).mT @ D, "B": self.s * D @ p["A"].to(x.dtype).mT}
        return {k: t.to(p[k].dtype) for k, t in found.items()}
