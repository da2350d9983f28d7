"""ORPO: Monolithic Preference Optimization without Reference Model.  Hong, Lee & Thorne, EMNLP 2024.  arXiv:2403.07691v2.

With p(y|x) = exp(log π(y|x) / |y|) and odds(y|x) = p / (1 − p) (equations 3 to 7):

    L = −log π(y_w|x) / |y_w| − λ log σ(log odds(y_w|x) / odds(y_l|x))

There is no reference.
Deviations: the first term is that of the answer alone; the authors' code takes the prompt's tokens in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from finebits.objectives.base import Said, halves, share


@dataclass(frozen=True)
class ORPO:
    """λ is `lam`, which TRL calls beta.

    >>> from finebits.objectives.base import Said
    >>> said = Said.of([-1.0, -1.0], [0.0, 0.0])
    >>> ORPO().margins(said), ORPO().losses(said)  # 1 + 0.1 log 2
    (tensor([0.]), tensor([1.0693]))
    """

    lam: float = 0.1
    reference: ClassVar[None] = None
    together: ClassVar[int] = 2
    shifted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        share(self.lam, "orpo.lam")

    def losses(self, said: Said) -> Float[Tensor, " g"]:
        return -halves(said.mean)[0] - self.lam * F.logsigmoid(self.margins(said))

    def margins(self, said: Said) -> Float[Tensor, " g"]:
        logp = said.mean.clamp(max=-1e-6)  # an answer that is certain has no finite odds
        more, less = halves(logp - torch.log(-torch.expm1(logp)))
        return more - less
