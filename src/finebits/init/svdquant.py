"""SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models.  Li et al., ICLR 2025.  arXiv:2411.05007v3.

Outliers of the inputs move into the weight, those of the weight into a low-rank branch, and what is left is quantized (section 4):

    λ_j = x_j^α / w_j^β,    Ŵ = W diag(λ),    U Σ V = SVD(Ŵ),    s·B A = U_r Σ_r V_r,    Q = quant(Ŵ − s·B A),    W ≈ (Q + s·B A) diag(λ)⁻¹

with x_j and w_j the sizes of input and column j, and (α, β) out of (0, 0), (i/`grid`, 0), (i/`grid`, 1 − i/`grid`) by the output error of
the layer with its branch; then the branch is fitted to Ŵ − Q and the rest quantized again for as long as the output error falls, `steps`
times at most (the authors' code, LQ-LoRA's loop). It is a start of the adapter `smoothed`, which divides the inputs by λ.
Deviations: x_j is the root mean square of input j, where the paper has its largest value (the code offers both); inputs are not quantized, so
the error is that of the weights, E ‖·x‖² through the Gram matrix; where quantizing loses nothing λ = 1;
no sharing of the branch's first factor between q, k and v; B and A are divided by √s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.init import _family as family
from finebits.init.base import BoundQuantizer, Init, Quantize
from finebits.linalg import SVD, top_svd
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.gram import Gram


@dataclass(frozen=True)
class SVDQuant(Init):
    """`grid` values of α, and at most `steps` refits of the branch.

    >>> gram = fb.Gram()
    >>> gram.add(torch.eye(2))
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> base, start = fb.SVDQuant()(W, fb.Smoothed(rank=1, alpha=1), torch.clone, {fb.Gram: gram})
    >>> base, start["B"] @ start["A"], start["lam"]  # nothing is lost, so nothing is smoothed
    (tensor([[0., 0.], [0., 1.]]), tensor([[3., 0.], [0., 0.]]), tensor([1., 1.]))
    """

    grid: int = 20
    steps: int = 8
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.grid < 0 or self.steps < 0:
            raise Invalid(f"SVDQuant needs grid >= 0 and steps >= 0; got {self}")

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W, R = W.float(), need(stats, Gram, "SVDQuant").to(W.device)
        family.check(W, adapter, "SVDQuant")
        out = family.Outputs(R, 0.0, W)
        x, w = _sizes(R.diagonal().clamp_min(0).sqrt()), _sizes(W.abs().amax(0))

        def split(lam: Tensor, Q: Tensor | float) -> tuple[float, Tensor, SVD]:
            svd = top_svd(W * lam - Q, adapter.rank)
            smoothed = quantize.smoothed(lam) if isinstance(quantize, BoundQuantizer) else quantize
            base = smoothed(W * lam - family.product(svd))
            return out.norm((dense(base, torch.float32) + family.product(svd)) / lam - W), base, svd

        powers = [(0.0, 0.0)] + [(i / self.grid, beta) for i in range(1, self.grid + 1) for beta in (0.0, 1 - i / self.grid)]
        lam, nothing = torch.ones_like(x), 1e-5 * out.norm(W)
        best = split(lam, 0.0)
        for alpha, beta in powers[1:] if best[0] > nothing else ():
            other = x**alpha / w**beta
            other = other / (other.max() * other.min()).sqrt()
            trial = split(other, 0.0)
            if trial[0] < best[0]:
                lam, best = other, trial
        for _ in range(self.steps if best[0] > nothing else 0):
            trial = split(lam, dense(best[1], torch.float32))
            if not trial[0] < best[0]:
                break
            best = trial
        _, Q, (U, S, Vh, _) = best
        return Q, {"lam": lam} | family.halves(U, S, Vh, adapter.s)


def _sizes(d: Tensor) -> Tensor:
    """What nothing reaches counts as a thousandth of the mean."""
    mean = float(d.mean())
    return d.clamp_min(1e-3 * mean) if mean > 0 else torch.ones_like(d)
