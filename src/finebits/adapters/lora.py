"""LoRA: Low-Rank Adaptation of Large Language Models.  Hu et al., ICLR 2022.  arXiv:2106.09685v2.
With the scaling of rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA.  Kalajdzievski, 2023.  arXiv:2312.03732v1.
Use it first: what most libraries and engines read, over any base, at little cost.

    W′ = W + s·B A,    B ∈ ℝ^{m×r},  A ∈ ℝ^{r×n},    s = α/r   (LoRA, section 4.1)   or   α/√r   (rsLoRA, eq. 4)

At birth B = 0 and A is uniform in ±1/√n.
Deviations: the paper draws A from a Gaussian; the authors' code uses kaiming_uniform(a = √5), which is the range above, and so does this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from finebits.adapters._family import Pair
from finebits.adapters.base import Params
from finebits.errors import Invalid


@dataclass(frozen=True)
class LoRA(Pair):
    """A low-rank update of rank `rank`; `scaling` is "lora" (α/r) or "rslora" (α/√r).

    >>> adapter = fb.LoRA(rank=1, alpha=2)  # s = 2
    >>> adapter.merged({"B": torch.tensor([[1.0], [0.0]]), "A": torch.tensor([[0.0, 3.0]])}, torch.eye(2))
    tensor([[1., 6.], [0., 1.]])
    >>> fb.LoRA(rank=16).size(4096, 4096)  # trained numbers
    131072
    """

    rank: int = 16
    alpha: float = 16.0
    scaling: Literal["lora", "rslora"] = "lora"
    frozen: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[str] = "loftq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling not in ("lora", "rslora"):
            raise Invalid(f"scaling is {self.scaling!r}; it can be 'lora' (alpha/r) or 'rslora' (alpha/sqrt(r))")

    @property
    def s(self) -> float:
        """The factor in front of B A.

        >>> fb.LoRA(rank=16, alpha=32).s, fb.LoRA(rank=16, alpha=32, scaling="rslora").s
        (2.0, 8.0)
        """
        return self.alpha / (self.rank if self.scaling == "lora" else math.sqrt(self.rank))

    def rows(self, p: Params, ids: Int[Tensor, "*t"], E: Float[Tensor, "*t n"]) -> Float[Tensor, "*t n"]:
        return E + self.s * F.embedding(ids, p["B"]) @ p["A"]  # and no s·B of all words
