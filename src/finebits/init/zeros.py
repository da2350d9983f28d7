"""QLoRA: Efficient Finetuning of Quantized LLMs (the start).  Dettmers et al., NeurIPS 2023.  arXiv:2305.14314v1.

The base is the quantized weight and the update is zero (eq. 5 with B = 0):

    Q = q_N(W),    s·B A = 0

Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.init.base import Init, Quantize
from finebits.stats.base import Statistic, Stats


@dataclass(frozen=True)
class Zeros(Init):
    """Quantize the weight, start the adapter at zero.

    >>> fb.Zeros()(torch.tensor([[1.4, -0.6]]), fb.LoRA(rank=1), torch.round, {})  # quantized to whole numbers
    (tensor([[1., -1.]]), {})
    """

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    exact: ClassVar[bool] = True
    moves: ClassVar[bool] = False

    def __call__(self, W: Float[Tensor, "m n"], adapter: Any, quantize: Quantize, stats: Stats) -> tuple[Tensor, Params]:
        return quantize(W), {}
