"""Prefix-Tuning: Optimizing Continuous Prompts for Generation.  Li and Liang, ACL 2021.  arXiv:2101.00190v1.
Use it where the model must stay as it is and a prompt is too weak: every layer attends to trained keys and values before all tokens.

    h = Attn(q, [P_k; K], [P_v; V]) in every layer,    P ∈ ℝ^{v × L·2·d_kv}, d_kv = heads of keys × their size           (eq. 3)
    P = W_up tanh(W_down E + b_d) + b_u,    E ∈ ℝ^{v×n}    where `hidden` units are asked for, while it is trained       (section 4.3)

At birth P is N(0, .02²), zero (which is no identity: a zero key takes part in every softmax), or the keys and values that given words leave in
the model (`ids`, v of them): then the model behaves as after these words. `settled` is P alone.
Deviations: P and E are born small, which the paper leaves open.
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
class PrefixTuning(Usual):
    """`tokens` trained keys and values in every layer; `hidden` > 0 trains them through a layer of so many units.

    >>> fb.PrefixTuning(tokens=200).size(28 * 1024, 3072)  # of Llama-3.2-3B, whose keys have 1024 numbers in each of 28 layers
    11468800
    """

    tokens: int = 20
    start: Literal["normal", "zero"] = "normal"
    ids: tuple[int, ...] | None = None
    hidden: int = 0
    rank: ClassVar[int] = 0
    form: ClassVar[Form] = "beside"
    over: ClassVar[Place] = "attention"
    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.hidden < 0:
            raise Invalid(f"prefix_tuning needs tokens >= 1 and hidden >= 0; got tokens {self.tokens} and hidden {self.hidden}")
        if self.ids is not None and (len(self.ids) != self.tokens or self.hidden):
            raise Invalid(
                f"prefix_tuning copies the keys of ids, as many as tokens ({self.tokens}), without hidden units; got {len(self.ids)}"
            )

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        if not self.hidden:
            return {"prefix": (self.tokens, 2 * m)}
        layers = {"down": (self.hidden, n), "down_bias": (self.hidden,), "up": (2 * m, self.hidden), "up_bias": (2 * m,)}
        return {"embeddings": (self.tokens, n)} | layers

    def params(self, base: Network, gen: Generator, start: Params) -> Params:
        p, shapes = Params(), self.shapes(*base.shape)
        for k, shape in shapes.items():
            if k == "prefix" and self.ids is not None:
                p[k] = base.remembered(torch.tensor(self.ids))
            elif k.endswith("bias") or (self.start == "zero" and k in ("prefix", "up")):
                p[k] = torch.zeros(shape)
            else:
                p[k] = torch.randn(shape, generator=gen) * (1 / math.sqrt(shape[-1]) if k == "down" else 0.02)
        return complete(p, start, "PrefixTuning")

    def prefix(self, p: Params) -> Float[Tensor, "v w"]:
        """P."""
        if not self.hidden:
            return p["prefix"]
        h = torch.tanh(F.linear(p["embeddings"], p["down"], p["down_bias"]))
        return F.linear(h, p["up"], p["up_bias"])

    def forward(self, p: Params, x: dict[str, Any], base: Network) -> Any:
        return base.prefixed(x, self.prefix(p))

    def settled(self, p: Params) -> tuple[dict[str, Any], Params]:
        """All that a trained model needs of it: P, and what it is, as data.

        >>> trained = fb.PrefixTuning(tokens=2, hidden=3)
        >>> p = {k: torch.ones(shape) for k, shape in trained.shapes(4, 5).items()}
        >>> data, q = trained.settled(p)
        >>> data, torch.equal(q["prefix"], trained.prefix(p))
        ({'paper': 'prefix_tuning', 'tokens': 2}, True)
        """
        return {"paper": "prefix_tuning", "tokens": self.tokens}, {"prefix": self.prefix(p)}
