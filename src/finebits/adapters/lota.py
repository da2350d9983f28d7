"""LoTA-QAF: Lossless Ternary Adaptation for Quantization-Aware Fine-Tuning.  Chen et al., NeurIPS 2025.  arXiv:2505.18724v2.
Use it with the optimizer t_sign_sgd where a model in integers is to be tuned and served as it is, and codes themselves are to move.

    ΔW = B A,  A ∈ {−1, 0, 1}^{r×n},  B ∈ {−1, 0, 1}^{m×r},    Ŵ = 1[ΔW > ω] − 1[ΔW < −ω],    W̃ = ΔW − ω Ŵ
    q′ = q + Ŵ,  which stays where it would leave the grid,    μ = mean of W̃ over a block / ω,    l′ = l + s μ

so that what is served is s q′ + l′, in the codes and blocks of the base. Gradients go straight through the steps of Ŵ, and through μ:

    ∂ΔW = s ∘ G + (Σ over the block of s ∘ G) / (g ω),    ∂B = ∂ΔW Aᵀ,    ∂A = Bᵀ ∂ΔW,    G = gᵀ x,  g columns in a block

A begins as a normal draw cut at ¾ of its mean magnitude, B at 0. ω = `threshold` · r.
Deviations: none that is known of the authors' code, which is followed (the paper's text was read in its abstract alone): μ is divided by ω, and
the mask of codes at an end of the grid is in the forward pass only. A base without real minima has no place for μ, which is left out then (their
option `residual`). l′ is rounded to what it is held in as it is used. A and B are float32 here, and any optimizer may move them; they stay
ternary with t_sign_sgd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._codes import Coded, uncast, wide
from finebits.adapters._rows import tiles
from finebits.adapters.base import Layer, Params, check_scale, complete
from finebits.blocks import pack, unpack
from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.formats.int import Int
from finebits.qtensor import QTensor


@dataclass(frozen=True)
class LoTA(Coded):
    """Codes that step up or down where a product of two ternary matrices of rank `rank` is above `threshold` times the rank.

    >>> q = fb.quantize(torch.tensor([[0.0, 15.0, 7.0]]), fb.Int(4, block=32, symmetric=False))
    >>> p = {"A": torch.tensor([[1.0, 1.0, -1.0]]), "B": torch.tensor([[1.0]])}  # up, up, which the grid ends at, and down
    >>> tuned = fb.LoTA(rank=1).coded(p, q)
    >>> tuned.codes().tolist(), tuned.parts["shift"]  # μ is what is left of 1, 1 and −1, on average, over ω
    ([[1, 15, 6]], tensor([[0.4444]]))
    """

    rank: int = 64
    threshold: float = 0.75
    kept: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def __post_init__(self) -> None:
        check_scale(self.rank, 1.0)
        if not 0 < self.threshold < 1:
            raise Invalid(f"threshold is {self.threshold}; it is a share of the rank, above 0 and below 1, or no code moves")

    @property
    def omega(self) -> float:
        """ω."""
        return self.threshold * self.rank

    @property
    def candidates(self) -> tuple[Format | None, ...]:
        return tuple(Int(bits, 64, False, "fp16") for bits in (2, 3, 4))

    def served(self, format: Format | None) -> Format:
        if isinstance(format, Int) and format.unit is None and isinstance(format.scale, str):
            return format
        came = "dense" if format is None else str(format)
        raise Invalid(f"LoTA moves the codes of integers under plain scales, and this weight is {came}: quantize it as int")

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank)}

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = self.under(base).shape
        drawn = torch.randn(self.rank, n, generator=gen)
        A = drawn.sign() * (drawn.abs() > 0.75 * drawn.abs().mean())
        return complete({"A": A, "B": torch.zeros(m, self.rank)}, start, "LoTA")

    def coded(self, p: Params, W: Float[Tensor, "m n"]) -> QTensor:
        q, (m, n) = cast(QTensor, W), W.shape
        format = cast(Int, q.format)
        codes, means = list[Tensor](), list[Tensor]()
        for rows, D in self._products(p, m, n):
            own = unpack(q.parts["codes"][rows], format.bits, n).int()
            step = self._steps(D)
            moved = own + step
            inside = (moved >= 0) & (moved <= format.top - format.first)
            codes.append(pack(torch.where(inside, moved, own).to(torch.uint8), format.bits))
            if format.form == "real":
                means.append(self._means(format, D - self.omega * (step * inside)) / self.omega)
        parts = q.parts | {"codes": torch.cat(codes)}
        if format.form == "real":
            low = parts["shift"]
            parts["shift"] = (low.float() + q.parts["scale"].float() * torch.cat(means)).to(low.dtype)
        return QTensor(parts, format, q.sizes, q.dtype)

    def gradients(self, p: Params, x: Tensor, g: Float[Tensor, "t m"], W: Tensor, made: Tensor) -> Params:
        (m, n), dtype = W.shape, wide(x)
        found = {k: torch.zeros(t.shape, dtype=dtype, device=t.device) for k, t in p.items()}
        A, B = p["A"].to(dtype), p["B"].to(dtype)
        for rows in tiles(m, n):
            dD = g[:, rows].to(dtype).mT @ x.to(dtype)
            if isinstance(W, QTensor):  # but where a run is planned without values
                format = cast(Int, W.format)
                dD = dD * format.spread(W.parts["scale"][rows].to(dtype), n)
                if format.form == "real":
                    dD = dD + format.spread(self._means(format, dD) / self.omega, n)
            found["B"][rows] = dD @ A.mT
            found["A"] += B[rows].mT @ dD
        return {k: t.to(p[k].dtype) for k, t in found.items()}

    def _products(self, p: Params, m: int, n: int) -> Iterator[tuple[slice, Float[Tensor, "r n"]]]:
        """Rows of ΔW, in float32."""
        with uncast(p["A"]):
            for rows in tiles(m, n):
                yield rows, p["B"][rows].float() @ p["A"].float()

    def _steps(self, D: Float[Tensor, "r n"]) -> Tensor:
        """Ŵ without the ends of the grid."""
        return (D > self.omega).int() - (D < -self.omega).int()

    @staticmethod
    def _means(format: Int, t: Float[Tensor, "r n"]) -> Float[Tensor, "r k"]:
        """Means over blocks, of which the last may be short."""
        many = format.cut(torch.ones_like(t[:1])).sum(-1)
        return format.cut(t).sum(-1) / many
