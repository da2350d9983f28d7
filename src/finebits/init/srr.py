"""SRR: Preserve-Then-Quantize: Balancing Rank Budgets for Quantization Error Reconstruction in LLMs.  2026.  arXiv:2602.02001v2.

The rank is split between what quantizing should not touch and what it lost, in QERA's metric S with S Sᵀ = E x xᵀ (Structured Residual
Reconstruction):

    C₁ = SVD_k(W S) S⁻¹,    Q = quant(W − C₁),    C₂ = SVD_{r−k}((W − C₁ − Q) S) S⁻¹,    s·B A = C₁ + C₂
    k  = argmin_{0 ≤ k ≤ r}  ρ_k(W S) · ρ_{r−k}(E S),    ρ_j(M) = 1 − ‖SVD_j(M)‖² / ‖M‖²

with E uniform noise in the quantization error's place, so that nothing is quantized to find k. k = 0 is QERA.
Deviations: S is the Cholesky factor, as in QERA; one draw of E, from a fixed seed; Q is kept only where its output error is less than that
of k = 0 (both are quantized), since the criterion knows no quantizer; C₁ + C₂ is factored anew, so that A and B share the singular values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.linalg import top_svd
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.gram import Gram


@dataclass(frozen=True)
class SRR(Init):
    """`damp` is relative to the mean square of the inputs.

    >>> gram = fb.Gram()
    >>> gram.add(torch.eye(2))
    >>> W = torch.tensor([[1.4, 0.0], [0.0, 1.0]])
    >>> Q, start = fb.SRR()(W, fb.LoRA(rank=1, alpha=1), torch.round, {fb.Gram: gram})
    >>> Q + start["B"] @ start["A"]  # one direction holds what whole numbers lose
    tensor([[1.4000, 0.0000], [0.0000, 1.0000]])
    """

    damp: float = 1e-4
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = False  # where nothing is quantized, k = 0 loses nothing

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W, r = W.float(), adapter.rank
        family.check(W, adapter, "SRR")
        out = family.Outputs(need(stats, Gram, "SRR"), self.damp, W)
        best: tuple[float, Tensor, Params] | None = None
        for k in dict.fromkeys((0, split(W, out.S, r))):
            U, S, V = out.top(W, k) if k else (W[:, :0], W[0, :0], W[:0])
            Q = quantize(W - U * S @ V)
            C = U * S @ V
            if k < r:
                U, S, V = out.top(W - C - dense(Q, torch.float32), r - k)
                C = C + U * S @ V
            error = out.norm(W - C - dense(Q, torch.float32))
            if best is None or error < best[0]:
                best = error, Q, family.halves(*out.top(C, r), adapter.s)
        assert best is not None
        return best[1], best[2]


def split(W: Float[Tensor, "m n"], S: Float[Tensor, "n n"], r: int) -> int:
    """How much of the rank preserves: the k of the criterion, the smallest of equals."""
    E = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)).to(W.device) - 0.5
    exposed, lost = (left(M @ S, r) for M in (W, E))
    return int((exposed * lost.flip(0)).argmin())


def left(M: Float[Tensor, "m n"], r: int) -> Float[Tensor, " k"]:
    """ρ_0 … ρ_r: the shares of M's energy outside its first directions.

    >>> left(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)  # all of it, and 1² of 3² + 1²
    tensor([1.0000, 0.1000])
    """
    energy = M.square().sum()
    if not energy > 0:
        return torch.zeros(r + 1)
    return torch.cat([torch.ones(1), 1 - (top_svd(M, r).S.square().cumsum(0) / energy).cpu()]).clamp_min(0)
