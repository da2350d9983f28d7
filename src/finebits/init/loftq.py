"""LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models.  Li et al., ICLR 2024.  arXiv:2310.08659v4.

Finds W ≈ Q + s·B A by alternating the two best answers (Alg. 1), from B A = 0:

    Q_t      = q_N(W − s·B_{t−1} A_{t−1})
    B_t, A_t = top-r singular triples of W − Q_t, √Σ in each factor

Deviations:
- the factors are divided by √s, so that the start is the same for every scale s of the adapter; the paper has s = 1;
- the best iterate is kept, not the last: at 2 bits the error is not monotone in t;
- order="svd" starts from the top-r triples of W instead of zero, so that the first Q is not spent on what the low-rank part can hold;
- where quantizing loses nothing, the adapter starts as it is born, not at A = B = 0, and directions without loss get a row of A;
- the triples come from a block Krylov method (linalg.top_svd), not from a full SVD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.init import _family as family
from finebits.init.base import Init, Quantize
from finebits.linalg import top_svd
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class LoftQ(Init):
    """T = `steps` alternations; `order` is the paper's "quantize" (first) or "svd" (first).

    >>> W = torch.tensor([[1.3, 2.3], [1.3, 2.3]])
    >>> Q, start = fb.LoftQ()(W, fb.LoRA(rank=1, alpha=1), torch.round, {})  # what whole numbers lose is .3 everywhere: rank one
    >>> Q, start["B"] @ start["A"]
    (tensor([[1., 2.], [1., 2.]]), tensor([[0.3000, 0.3000], [0.3000, 0.3000]]))
    """

    steps: int = 5
    order: Literal["quantize", "svd"] = "quantize"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Invalid(f"LoftQ needs steps >= 1, not {self.steps}; init zeros is LoftQ with no step")
        if self.order not in ("quantize", "svd"):
            raise Invalid(f"order is {self.order!r}; it can be 'quantize' (the paper's) or 'svd'")

    @property
    def moves(self) -> bool:
        """Whether the low-rank part comes first."""
        return self.order == "svd"

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "LoftQ")
        V = W - family.product(top_svd(W, adapter.rank)) if self.order == "svd" else W
        best: tuple[float, Tensor, Any] | None = None
        for t in range(self.steps):
            Q = quantize(V)
            svd = top_svd(W - dense(Q, torch.float32), adapter.rank)
            if best is None or svd.rest < best[0]:
                best = svd.rest, Q, svd
            if t + 1 < self.steps:
                V = W - family.product(svd)
        assert best is not None
        U, S, Vh, _ = best[2]
        return best[1], family.halves(U, S, Vh, adapter.s)
