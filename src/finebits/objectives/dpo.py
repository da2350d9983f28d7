"""DPO: Direct Preference Optimization: Your Language Model is Secretly a Reward Model.  Rafailov et al., NeurIPS 2023.  arXiv:2305.18290v3.

With y_w liked more than y_l (equation 7):

    L = −log σ(β [log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)])

and where a share ε of the pairs is thought to be labelled the wrong way round (conservative DPO, Mitchell's note of 2023),

    (1 − ε) L + ε L with y_w and y_l exchanged.

Deviations: π_ref is the model as it starts, whose answers are scored once before the first step; "base" is the model without its adapters,
which is the same where these start at nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from finebits.objectives.base import Said, halves, share


@dataclass(frozen=True)
class DPO:
    """β says how dear it is to leave the reference; ε is `label_smoothing`.

    >>> from finebits.objectives.base import Said
    >>> DPO().losses(Said.of([-2.0, -3.0], [-2.0, -3.0]))  # log 2 where nothing was learned
    tensor([0.6931])
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference: Literal["start", "base"] = "start"
    together: ClassVar[int] = 2
    shifted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        share(self.beta, "dpo.beta")
        share(self.label_smoothing, "dpo.label_smoothing", 0.0, 0.5)

    def losses(self, said: Said) -> Float[Tensor, " g"]:
        m, eps = self.margins(said), self.label_smoothing
        return -(1 - eps) * F.logsigmoid(m) - eps * F.logsigmoid(-m)

    def margins(self, said: Said) -> Float[Tensor, " g"]:
        more, less = halves(said.ratio)
        return self.beta * (more - less)
