"""QuIP: 2-Bit Quantization of Large Language Models With Guarantees (LDLQ).  Chee et al., NeurIPS 2023.  arXiv:2307.13304v2.

Rounding with linear feedback from the columns that are already rounded (eq. 2), optimal among all such (Thm. 1):

    H = R + λI = (U + I) D (U + I)ᵀ,    U strictly upper triangular                                                     (eq. 4)
    Ŵ_k = Q(W_k + (W − Ŵ)_{<k} U_{<k,k})                                                                                (eq. 3)

then `passes` of coordinate descent under the same scales ("greedy", algorithm 2 of the supplement), none of which can lose:

    Ŵ_k = Q(W_k − ((Ŵ − W) H_k − (Ŵ − W)_k H_kk) / H_kk)

With no pass this is GPTQ under scales fitted beforehand (Thm. 6). Scales are found as in GPTQ here: scales="search" weighs column k by D_k.
Deviations: no incoherence processing (random rotations are not a rounding), nearest rounding only, no reordering; one scale a block where
the paper has one a matrix; atoms of vector formats are rounded as one (and take no passes); a row that rounding to nearest serves better
(measured by R, undamped) keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats.base import Format, Parts
from finebits.linalg import damped_cholesky
from finebits.qtensor import QTensor
from finebits.quantizers import _family as family
from finebits.quantizers.base import Quantizer
from finebits.stats.base import Statistic, Stats
from finebits.stats.gram import Gram


@dataclass(frozen=True)
class LDLQ(Quantizer):
    """`passes` of greedy descent follow the feedback; `scales` is "format" or "search"; `lazy` changes no result.

    >>> gram = fb.Gram()
    >>> gram.add(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))  # the last two inputs are always the same
    >>> W = torch.tensor([[7.0, 0.4, 0.4]])
    >>> fb.quantize(W, fb.Int(4), fb.LDLQ(), {fb.Gram: gram}).dequantize()  # column 2 goes for .4 + .4
    tensor([[7., 0., 1.]])
    """

    passes: int = 2
    damp: float = 0.01
    scales: Literal["format", "search"] = "format"
    lazy: int = 128
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})

    def __post_init__(self) -> None:
        if self.passes < 0:
            raise Invalid(f"passes is {self.passes}; it counts sweeps over the columns, at least 0")
        family.check_settings(self)

    def __call__(self, W: Float[Tensor, "*e m n"], format: Format, stats: Stats) -> QTensor:
        def factor(R: Tensor) -> Tensor:  # H = M Mᵀ, M upper triangular: M = (U + I) √D
            return family.once(stats, ("LDLQ", (self.damp, R.device)), lambda: damped_cholesky(R.flip(0, 1), self.damp).flip(0, 1))

        return family.calibrated(W, format, stats, "LDLQ", lambda w, R: self._round(w, format, R, factor(R)))

    def _round(self, W: Float[Tensor, "m n"], format: Format, R: Float[Tensor, "n n"], M: Float[Tensor, "n n"]) -> tuple[Tensor, Parts]:
        n, g = W.shape[-1], family.atom(format)
        root = M.diagonal()
        parts = family.fitted(self.scales, format, W, root.square())
        scales, block = format.scales(parts, n), family.block_of(format, n)
        w = W.mT.contiguous()  # (n, m): a column of W is a row here
        D = torch.zeros_like(w)  # W − Ŵ
        codes: list[Tensor] = [w[:0]] * (n // g)

        def round_(k: int, target: Tensor) -> None:
            here = family.block_scales(scales, block[k])
            codes[k // g] = format.encode(target.mT, here)
            D[k : k + g] = w[k : k + g] - format.decode(codes[k // g], here).mT

        for i, j in family.edges(n, self.lazy, g, g):
            U = M[:j, i:j] if g > 1 else M[:j, i:j] / root[i:j]
            far = U[:i].mT @ D[:i]
            for k in range(i, j, g):
                a = slice(k - i, k - i + g)
                fed = far[a] + U[i:k, a].mT @ D[i:k]
                if g > 1:  # an atom's own block of M takes the place of √D_k
                    fed = torch.linalg.solve_triangular(M[k : k + g, k : k + g].mT, fed, upper=False)
                round_(k, w[k : k + g] + fed)
        if g == 1:
            H = R.float() + (M @ M.mT - R).diagonal().diag()
            for _ in range(self.passes):
                before = list(codes)
                self._descend(H, w, D, round_)
                if all(torch.equal(a, b) for a, b in zip(before, codes, strict=True)):
                    break
        return torch.cat(codes, -1), parts

    def _descend(self, H: Tensor, w: Tensor, D: Tensor, round_: Callable[[int, Tensor], None]) -> None:
        n = len(w)
        for i, j in family.edges(n, self.lazy, 1):
            P = H[i:j] @ D  # (columns, m): (W − Ŵ) H, kept up to date inside the batch
            for k in range(i, j):
                was = D[k].clone()
                round_(k, (w[k] + (P[k - i] - was * H[k, k]) / H[k, k])[None])
                P += H[i:j, k, None] * (D[k] - was)
