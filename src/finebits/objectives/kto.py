"""KTO: Model Alignment as Prospect Theoretic Optimization.  Ethayarajh, Xu, Muennighoff, Jurafsky & Kiela, ICML 2024.  arXiv:2402.01306v4.

With r = log π(y|x)/π_ref(y|x) and λ of the kind of answer (equation 8):

    v = λ_D σ(β (r − z)) where y was wanted, λ_U σ(β (z − r)) where it was not,    L = λ_y − v
    z = max(0, mean of log π(y'|x)/π_ref(y'|x) over answers y' to other prompts), without a gradient

Deviations: z is that of all rows of a step, on all processes, so that what a step is cut into changes nothing; y' is the answer of the next row
of the file. π_ref is the model as it starts, or its base alone, as in dpo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.objectives.base import Said, share


@dataclass(frozen=True)
class KTO:
    """λ_D and λ_U are `desirable` and `undesirable`: of unbalanced rows λ_D n_D / λ_U n_U is to be between 1 and 4/3.

    >>> from finebits.objectives.base import Said
    >>> KTO().losses(Said.of([-2.0, -3.0], [-2.0, -3.0]))  # 1 − σ(0)
    tensor([0.5000, 0.5000])
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    reference: Literal["start", "base"] = "start"
    together: ClassVar[int] = 1
    shifted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("beta", "desirable", "undesirable"):
            share(getattr(self, name), f"kto.{name}")

    def losses(self, said: Said) -> Float[Tensor, " r"]:
        weight = torch.where(said.liked, self.desirable, self.undesirable)
        return weight * (1 - torch.sigmoid(self.margins(said)))

    def margins(self, said: Said) -> Float[Tensor, " r"]:
        r = said.ratio - said.z
        return self.beta * torch.where(said.liked, r, -r)
