"""Trainable tokens: some rows of the table of embeddings are trained, and no others (PEFT's TrainableTokens, for which there is no paper).
Use it for new special tokens, or words that have come to mean something else; beside another adapter name them in `trainable_token_indices`.

    E′ = E with T in the rows `indices`,    T ∈ ℝ^{k×n};    a head that is the same tensor multiplies by E′ as well

At birth T is these rows of E, of codes too what they stand for. T replaces them, so that it does not matter what they were.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters.base import Form, Layer, Params, Place, Rescaled, complete
from finebits.errors import Invalid
from finebits.qtensor import dense


@dataclass(frozen=True)
class TrainableTokens(Usual):
    """The rows `indices`, in rising order, whatever order they are given in.

    >>> adapter = fb.TrainableTokens(indices=(1,))
    >>> adapter.rows({"tokens": torch.tensor([[5.0, 6.0]])}, torch.tensor([0, 1]), torch.zeros(2, 2))
    tensor([[0., 0.],
            [5., 6.]])
    >>> fb.TrainableTokens(indices=(3, 7)).size(49152, 576)
    1152
    """

    indices: tuple[int, ...] = ()
    rank: ClassVar[int] = 0
    form: ClassVar[Form] = "scaled"
    over: ClassVar[Place] = "table"
    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if any(i < 0 for i in self.indices) or len(set(self.indices)) < len(self.indices):
            raise Invalid(f"indices are numbers of words from 0, each once, and {list(self.indices)} came")
        object.__setattr__(self, "indices", tuple(sorted(self.indices)))

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        if self.indices and self.indices[-1] >= m:
            raise Invalid(f"word {self.indices[-1]} is to be trained, and the table of embeddings has those from 0 to {m - 1}")
        return {"tokens": (len(self.indices), n)}

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        if not self.size(*base.shape):
            raise Invalid("trainable_tokens trains the words that indices names, and it names none")
        W = base.weight
        return complete({"tokens": F.embedding(self._at(W), W).detach().float()}, start, "TrainableTokens")

    def rows(self, p: Params, ids: Int[Tensor, "*t"], E: Float[Tensor, "*t n"]) -> Float[Tensor, "*t n"]:
        at = self._at(ids)
        place = torch.searchsorted(at, ids.long()).clamp(max=len(at) - 1)
        return torch.where((at[place] == ids)[..., None], F.embedding(place, p["tokens"]), E)

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        at, b = self._at(x), base.bias
        return base(x).index_copy(-1, at, F.linear(x, p["tokens"], None if b is None else b[at].to(x.dtype)))

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return dense(W, p["tokens"].dtype).index_copy(0, self._at(W), p["tokens"])

    def scaled(self, p: Params, W: Float[Tensor, "m n"]) -> Rescaled:
        """One-hot rows, and what stands there now less what did."""
        at, T = self._at(W), p["tokens"]
        return Rescaled(None, None, F.one_hot(at, len(W)).mT.to(T.dtype), T - F.embedding(at, W).to(T.dtype))

    def _at(self, like: Tensor) -> Int[Tensor, " k"]:
        return torch.tensor(self.indices, dtype=torch.int64, device=like.device)
