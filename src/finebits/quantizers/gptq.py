"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers.  Frantar et al., ICLR 2023.  arXiv:2210.17323v2.

Columns are rounded one after the other, and what each loses is made good by the columns that are still to come (Alg. 1):

    H⁻¹ = Uᵀ U,  H = R + λI,  λ = damp·mean(diag R)           U upper triangular (eq. 3; the paper's 2X Xᵀ differs by a factor that cancels)
    Q_j = quant(W_j),    E_j = (W_j − Q_j) / U_jj,    W_k ← W_k − E_j U_jk  for k > j                              (eqs. 4, 5)

with updates beyond a batch of up to `lazy` columns made once a batch (section 3.3). When a block of the format is entered, its scale is
fitted to the columns as they are by then. U comes from one Cholesky factor of H with rows and columns in reverse and one triangular inverse.

Deviations:
- a block's scale is fitted to the columns as they are when it is entered, as the paper says; the code's, to those of its last batch.
- `act_order` visits the columns by falling diag H, as the authors' code does; blocks are not permuted, so their scales are fitted beforehand
  (the code's static_groups). So are scales that cannot be held block by block (a second level, one a row, codebooks).
- scales="search" tries multiples of the format's scale, and least squares refits of the best, and keeps the least Σ_j (Q_j − W_j)² / U_jj²:
  what the block adds to the output error.
- An atom of g columns of a vector format is rounded as one, with the block U_jj of g columns in the place of the number.
- Columns that no input reaches are rounded to nearest; the code sets them to zero.
- A row that rounding to nearest serves better (measured by R, undamped) keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finebits.formats.base import Format, Parts, Scales
from finebits.linalg import damped_cholesky
from finebits.qtensor import QTensor
from finebits.quantizers import _family as family
from finebits.quantizers.base import Quantizer
from finebits.stats.base import Statistic, Stats
from finebits.stats.gram import Gram


@dataclass(frozen=True)
class GPTQ(Quantizer):
    """`scales` is "format" (the format's own fit) or "search"; `lazy` trades the size of products for their number and changes no result.

    >>> gram = fb.Gram()
    >>> gram.add(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))  # the last two inputs are always the same
    >>> W = torch.tensor([[7.0, 0.4, 0.4]])
    >>> fb.quantize(W, fb.Int(4), fb.GPTQ(), {fb.Gram: gram}).dequantize()  # what column 1 lost, column 2 makes good: .4 + .4 becomes 1
    tensor([[7., 0., 1.]])
    """

    damp: float = 0.01
    act_order: bool = False
    scales: Literal["format", "search"] = "format"
    lazy: int = 128
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})

    def __post_init__(self) -> None:
        family.check_settings(self)

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor:
        def factors(R: Tensor) -> tuple[Tensor, Tensor]:
            g, order = family.atom(format), torch.arange(len(R), device=R.device)
            if self.act_order:
                order = order.view(-1, g)[R.diagonal().view(-1, g).sum(1).argsort(descending=True, stable=True)].flatten()
            key = "GPTQ", (self.damp, self.act_order and g, R.device)
            return order, family.once(stats, key, lambda: inverse_factor(R[order][:, order], self.damp))

        return family.calibrated(W, format, stats, "GPTQ", lambda w, R: self._round(w, format, *factors(R)))

    def _round(self, W: Float[Tensor, "m n"], format: Format, order: Int[Tensor, " n"], U: Float[Tensor, "n n"]) -> tuple[Tensor, Parts]:
        n, g = W.shape[-1], family.atom(format)
        weight = torch.empty_like(U[0]).index_copy(0, order, U.diagonal().square().reciprocal())
        entered = family.independent(format) and not self.act_order  # blocks are fitted when they are reached
        parts = [] if entered else [family.fitted(self.scales, format, W, weight)]
        scales = format.scales(parts[0], n) if parts else Scales(W)
        block = family.block_of(format, n)
        w = W[:, order].mT.contiguous()  # (n, m): a column of W is a row here
        codes: list[Tensor] = [w[:0]] * (n // g)
        for i, j in family.edges(n, self.lazy, int(format.block) if entered else g, g, cut=entered):
            if entered and i % int(format.block) == 0:
                b = slice(i, i + int(format.block))
                parts.append(family.fitted(self.scales, format, w[b].mT, weight[b]))
                scales = format.scales(parts[-1], len(w[b]))
            of = [0 if entered else block[int(c)] for c in order[i:j:g]]
            rounded, E = family.successive(format, w[i:j], U[i:j, i:j], scales, of)
            for c, code in zip(order[i:j:g].tolist(), rounded, strict=True):
                codes[c // g] = code
            w[j:] -= U[i:j, j:].mT @ E
        return torch.cat(codes, -1), {k: torch.cat([p[k] for p in parts], -1) for k in parts[0]}


def inverse_factor(H: Float[Tensor, "n n"], damp: float) -> Float[Tensor, "n n"]:
    """Upper triangular U with Uᵀ U = (H + λI)⁻¹."""
    L = damped_cholesky(H.flip(0, 1), damp)  # J H J = L Lᵀ, so H⁻¹ = (J L⁻¹ J)ᵀ (J L⁻¹ J), and J L⁻¹ J is upper triangular
    return torch.linalg.solve_triangular(L, torch.eye(len(L), device=L.device), upper=False).flip(0, 1)
