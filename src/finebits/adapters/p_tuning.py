"""P-Tuning: GPT Understands, Too.  Liu et al., 2021 (AI Open 2023).  arXiv:2103.10385v2.
Use it where prompt_tuning learns too slowly: the same embeddings before every row, trained through a small network that ties them together.

    [P; E(x)],    P = f(e_1 … e_v),    e ∈ ℝ^{v×n} trained with f
    mlp    f(e) = W_3 relu(W_2 relu(W_1 e + b_1) + b_2) + b_3,   h units in between
    lstm   f(e) = W_2 relu(W_1 LSTM(e) + b_1) + b_2,   two layers in both directions of h units each, W_1 (2h, 2h)      (section 3.2)

f is a means of training: what a trained model needs is P alone, which is prompt tuning (`settled`).
Deviations: virtual tokens stand before the row, where the paper lays them into templates; the LSTM has no dropout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters.base import Form, Network, Params, Place, complete
from finebits.errors import Invalid


@dataclass(frozen=True)
class PTuning(Usual):
    """`tokens` embeddings before every row, made by an encoder of `hidden` units.

    >>> fb.PTuning(tokens=20, hidden=128).size(1000, 64)  # 20·64, and 64·128 + 128 + 128² + 128 + 128·64 + 64
    34368
    """

    tokens: int = 20
    hidden: int = 128
    encoder: Literal["mlp", "lstm"] = "mlp"
    rank: ClassVar[int] = 0
    form: ClassVar[Form] = "beside"
    over: ClassVar[Place] = "model"
    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.hidden < 1:
            raise Invalid(f"p_tuning needs tokens >= 1 and hidden >= 1; got tokens {self.tokens} and hidden {self.hidden}")

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        h = self.hidden
        made: dict[str, tuple[int, ...]] = {"embeddings": (self.tokens, n)}
        if self.encoder == "lstm":
            for layer in range(2):
                for way in ("forward", "back"):
                    at = f"{way}{layer}"
                    made |= {f"{at}_ih": (4 * h, 2 * h if layer else n), f"{at}_hh": (4 * h, h)}
                    made |= {f"{at}_ih_bias": (4 * h,), f"{at}_hh_bias": (4 * h,)}
        widths = (n, h, h, n) if self.encoder == "mlp" else (2 * h, 2 * h, n)
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False), 1):
            made |= {f"W{i}": (b, a), f"b{i}": (b,)}
        return made

    def params(self, base: Network, gen: Generator, start: Params) -> Params:
        p, fan = Params(), 1
        for k, shape in self.shapes(*base.shape).items():
            if k == "embeddings":
                p[k] = torch.randn(shape, generator=gen)
                continue
            fan = shape[-1] if k.startswith("W") else self.hidden if "h" in k else fan  # a bias as the matrix before it
            p[k] = (torch.rand(shape, generator=gen) * 2 - 1) / math.sqrt(fan)
        return complete(p, start, "PTuning")

    def encoded(self, p: Params) -> Float[Tensor, "v n"]:
        """P."""
        x = p["embeddings"]
        if self.encoder == "lstm":
            for layer in range(2):
                x = torch.cat([_lstm(p, f"forward{layer}", x), _lstm(p, f"back{layer}", x.flip(0)).flip(0)], 1)
        last = sum(k.startswith("W") for k in p)
        for i in range(1, last):
            x = F.relu(F.linear(x, p[f"W{i}"], p[f"b{i}"]))
        return F.linear(x, p[f"W{last}"], p[f"b{last}"])

    def forward(self, p: Params, x: dict[str, Any], base: Network) -> Any:
        return base.prompted(x, self.encoded(p))

    def settled(self, p: Params) -> tuple[dict[str, Any], Params]:
        """All that a trained model needs of it: prompt tuning, as data, and its tensor."""
        return {"paper": "prompt_tuning", "tokens": self.tokens}, {"prompt": self.encoded(p)}


def _lstm(p: Params, at: str, x: Float[Tensor, "v i"]) -> Float[Tensor, "v h"]:
    """One layer in one direction, from zero states; gates in the order of torch: in, forget, cell, out."""
    inputs = F.linear(x, p[f"{at}_ih"], p[f"{at}_ih_bias"])
    h = c = torch.zeros_like(inputs[0, : p[f"{at}_hh"].shape[1]])
    states: list[Tensor] = []
    for row in inputs:
        i, f, g, o = (row + F.linear(h, p[f"{at}_hh"], p[f"{at}_hh_bias"])).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return torch.stack(states)
