"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning.  Lester, Al-Rfou and Constant, EMNLP 2021.  arXiv:2104.08691v2.
Use it where an adapter must be tiny and touch nothing of the model: many of them are served over one copy. Wants a high learning rate.

    [P; E(x)],    P ∈ ℝ^{v×n}: v trained embeddings stand before those of every row

At birth P are embeddings of words drawn at random (vocabulary), those of given words, repeated or cut to v (`ids`), or N(0, .5²) (normal).
Deviations: normal is Gaussian where the paper draws uniformly in ±.5; words are drawn from the whole vocabulary, not from its 5,000 most common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator

from finebits.adapters._family import Usual
from finebits.adapters.base import Form, Network, Params, Place, complete
from finebits.errors import Invalid


@dataclass(frozen=True)
class PromptTuning(Usual):
    """`tokens` trained embeddings before every row.

    >>> fb.PromptTuning(tokens=200).size(128256, 3072)  # of Llama-3.2-3B
    614400
    """

    tokens: int = 20
    start: Literal["vocabulary", "normal"] = "vocabulary"
    ids: tuple[int, ...] | None = None
    rank: ClassVar[int] = 0
    form: ClassVar[Form] = "beside"
    over: ClassVar[Place] = "model"
    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise Invalid(f"prompt_tuning needs tokens >= 1; got {self.tokens}")
        if self.ids is not None and not self.ids:
            raise Invalid("prompt_tuning starts from the words in ids, and it is empty: name some, or leave it out")

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"prompt": (self.tokens, n)}

    def params(self, base: Network, gen: Generator, start: Params) -> Params:
        words, n = base.shape
        if self.ids is not None:
            prompt = base.rows(torch.tensor(self.ids).repeat(-(-self.tokens // len(self.ids)))[: self.tokens])
        elif self.start == "vocabulary":
            prompt = base.rows(torch.randint(words, (self.tokens,), generator=gen))
        else:
            prompt = 0.5 * torch.randn(self.tokens, n, generator=gen)
        return complete({"prompt": prompt}, start, "PromptTuning")

    def forward(self, p: Params, x: dict[str, Any], base: Network) -> Any:
        return base.prompted(x, p["prompt"])
