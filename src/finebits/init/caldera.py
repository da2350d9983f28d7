"""CALDERA: Compressing Large Language Models using Low Rank and Low Precision Decomposition.  Saha et al., NeurIPS 2024.  arXiv:2405.18886v2.
With CLoQ: Enhancing Fine-Tuning of Quantized LLMs via Calibrated LoRA Initialization.  Deng et al., 2025.  arXiv:2501.18475v1.

Alternates a calibrated quantizer with the calibrated low-rank optimum (Alg. 1), from L = 0:

    Q_t = quant(W − L_{t−1}),    L_t = argmin_{rank ≤ r} E ‖(W − Q_t − L) x‖²                          (Lemma 4.2: QERA's closed form)

and keeps the iterate with the least output error. `quantize` is the plan's: GPTQ or LDLQ there make it CALDERA; with steps = 1 it is CLoQ.
order="svd" starts from the calibrated top-r part of W in place of zero.
Deviations: the factors stay in full precision (they will be trained), so that no inner alternation is needed; the square root of R is its
Cholesky factor and damped, as in qera.py; the factors are divided by the adapter's scale. CALDERA starts as order="svd" does.
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
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.gram import Gram


@dataclass(frozen=True)
class Caldera(Init):
    """T = `steps` alternations; `order` is "svd" (CALDERA's) or "quantize" (CLoQ's) first.

    >>> gram = fb.Gram()
    >>> gram.add(torch.tensor([[1.0, 0.0], [0.0, 10.0]]))  # the second input is ten times as large
    >>> W = torch.tensor([[1.4, 0.0], [0.0, 1.3]])
    >>> Q, start = fb.Caldera()(W, fb.LoRA(rank=1, alpha=1), torch.round, {fb.Gram: gram})
    >>> Q, start["B"] @ start["A"]  # so its column goes into the adapter whole
    (tensor([[1., 0.], [0., 0.]]), tensor([[0.0000, 0.0000], [0.0000, 1.3000]]))
    """

    steps: int = 5
    order: Literal["svd", "quantize"] = "svd"
    damp: float = 1e-4
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Invalid(f"Caldera needs steps >= 1, not {self.steps}; init zeros is the start with no step")

    @property
    def moves(self) -> bool:
        """Whether the low-rank part comes first."""
        return self.order == "svd"

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        W = W.float()
        family.check(W, adapter, "Caldera")
        out = family.Outputs(need(stats, Gram, "Caldera"), self.damp, W)
        U, S, V = out.top(W, adapter.rank)
        L = U * S @ V if self.order == "svd" else torch.zeros_like(W)
        best = None
        for _ in range(self.steps):
            Q = quantize(W - L)
            E = W - dense(Q, torch.float32)
            U, S, V = out.top(E, adapter.rank)
            L = U * S @ V
            error = out.norm(E - L)
            if best is None or error < best[0]:
                best = error, Q, (U, S, V)
        assert best is not None
        return best[1], family.halves(*best[2], adapter.s)
