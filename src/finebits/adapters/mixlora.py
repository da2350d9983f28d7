"""MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts.  Li et al., 2024.  arXiv:2404.15159v3.
Use it for several kinds of data in one adapter: tokens choose which of the updates of a feed-forward sublayer they get.

An expert e is the frozen sublayer with updates of its own over its matrices; a router sends every token to the K it gives most weight:

    E_e(x) = D_e(act(G_e(x)) ∘ U_e(x)),    G_e(x) = W_g x + s·B_e A_e x,  and so U_e and D_e,    s = α/r
    p = softmax(W_r x),    y = Σ_{e ∈ top-K} p_e / (Σ_{top-K} p) · E_e(x)                                             (eq. 3-5)

W_g x and W_u x are computed once for all experts; and since the weights sum to 1, so is the product with W_d, of Σ_e w_e h_e. W_r is
N(0, .02²), the A as LoRA's, the B zero; the router computes in float32. Rule `mixlora_balance` spreads the load. It is no weight: it exports as
nothing else. `attention` is an adapter for the planned matrices outside of the sublayers (the paper: LoRA).
Deviations: no noise on the router, at inference or in training, and top-K alone; every token's products with all A of a matrix are computed, and
those of the experts that it does not go to are dropped, so that no shape depends on the data.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from finebits import registry
from finebits.adapters._family import Scaled
from finebits.adapters.base import FeedForward, Form, Params, Place, complete
from finebits.errors import Invalid

PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class MixLoRA(Scaled):
    """`experts` sets of rank `rank` over every feed-forward sublayer, `top_k` of them for a token.

    >>> adapter = fb.MixLoRA(rank=8, experts=8)
    >>> adapter.size(11008, 4096)  # over a sublayer of LLaMA-2-7B: 8 · 8 · 3 · (4096 + 11008), and the router's 8 · 4096
    2932736
    """

    rank: int = 8
    alpha: float = 16.0
    experts: int = 8
    top_k: int = 2
    attention: Any = None
    gated: bool = True  # has the sublayer a gate? Sublayers of one matrix in and one out have none
    own: ClassVar[str] = "zeros"
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})
    frozen: ClassVar[frozenset[str]] = frozenset()
    form: ClassVar[Form] = "beside"
    over: ClassVar[Place] = "feed_forward"
    kept: ClassVar[frozenset[str]] = frozenset({"router"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.experts:
            raise Invalid(f"mixlora needs 1 <= top_k <= experts; got top_k {self.top_k} and experts {self.experts}")
        beside: Any = self.attention
        if isinstance(beside, str):  # by its name, with its own defaults
            beside = registry.from_json("adapters", beside)
            object.__setattr__(self, "attention", beside)
        if beside is not None and beside.over != "matrix":
            raise Invalid(f"mixlora.attention lies over matrices, and {type(beside).__name__} does not: take lora")

    @property
    def beside(self) -> Any:
        """The adapter of the planned matrices outside of the sublayers."""
        return self.attention

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        E, r = self.experts, self.rank
        made: dict[str, tuple[int, ...]] = {"router": (E, n)}
        for part in PARTS if self.gated else PARTS[1:]:
            out, inner = (n, m) if part == "down" else (m, n)
            made |= {f"{part}_A": (E, r, inner), f"{part}_B": (E, out, r)}
        return made

    def params(self, base: FeedForward, gen: Generator, start: Params) -> Params:
        p = Params()
        for k, shape in self.shapes(*base.shape).items():
            if k == "router":
                p[k] = 0.02 * torch.randn(shape, generator=gen)
            elif k.endswith("A"):
                p[k] = (torch.rand(shape, generator=gen) * 2 - 1) / math.sqrt(shape[-1])
            else:
                p[k] = torch.zeros(shape)
        return complete(p, start, "MixLoRA")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: FeedForward) -> Float[Tensor, "*t n"]:
        with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(x.float(), p["router"].float()).softmax(-1)  # (*t, E)
        weights, chosen = probabilities.topk(self.top_k)
        w = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)[..., None]  # (*t, K, 1)
        to = F.one_hot(chosen, self.experts)  # (*t, K, E)
        base.note((probabilities, to))
        g, u = base.both(x)
        if (g is not None) != self.gated:
            raise Invalid(f"mixlora has gated = {self.gated}, and the sublayer has {'a' if g is not None else 'no'} gate: say it otherwise")
        z = base.drop(x).unsqueeze(-2)  # (*t, 1, n)
        gates = None if g is None else g.unsqueeze(-2) + self._update(p, "gate", z, to)
        h = base.inner(gates, u.unsqueeze(-2) + self._update(p, "up", z, to))  # (*t, K, m)
        return base.down((w * h).sum(-2)) + (w * self._update(p, "down", base.drop(h), to)).sum(-2)

    def _update(self, p: Params, part: str, z: Float[Tensor, "*t k n"], to: Int[Tensor, "*t K E"]) -> Float[Tensor, "*t K m"]:
        """s·B_e A_e z for the experts e that a token goes to: all A z are made, and those of other experts zeroed."""
        A, B = p[f"{part}_A"], p[f"{part}_B"]  # (E, r, n), (E, m, r)
        Az = F.linear(z, A.flatten(0, 1))
        own = Az.view(*Az.shape[:-1], *A.shape[:2]) * to[..., None].to(z.dtype)  # (*t, K, E, r)
        return F.linear(own.flatten(-2), self.s * B.transpose(0, 1).flatten(1))
