"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.  Ben Zaken et al., ACL 2022.  arXiv:2106.10199v5.
Use it where almost nothing may be trained or stored: one number an output, whatever the base is held in.

    y = W x + b + Δb                                                                                                  (section 3)

At birth Δb = 0.
Deviations: what is trained is added to the bias, zero at birth, so that layers without one (as in Llama) have one too and weight decay pulls
towards the model; biases of norms are no linear layer's and stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters.base import Form, Layer, Params, Rescaled, complete
from finebits.qtensor import dense


@dataclass(frozen=True)
class BitFit(Usual):
    """A trained vector beside the outputs of a layer.

    >>> fb.BitFit().bias({"b": torch.tensor([2.0])}, torch.tensor([1.0])), fb.BitFit().size(4096, 1024)
    (tensor([3.]), 4096)
    """

    rank: ClassVar[int] = 0
    form: ClassVar[Form] = "scaled"
    drops: ClassVar[bool] = False

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        return complete({"b": torch.zeros(base.weight.shape[0])}, start, "BitFit")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return base(x) + p["b"]

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return dense(W)

    def scaled(self, p: Params, W: Float[Tensor, "m n"]) -> Rescaled:
        """The weight as it is: all that there is is the bias."""
        m, n = W.shape
        return Rescaled(None, None, p["b"].new_zeros(m, 0), p["b"].new_zeros(0, n))

    def bias(self, p: Params, b: Tensor | None) -> Tensor | None:
        return p["b"] if b is None else b + p["b"]

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"b": (m,)}
