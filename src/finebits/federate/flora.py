"""FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations.  Wang et al., NeurIPS 2024.  arXiv:2409.05976v1.

Adapters are stacked, whatever their ranks, and the product is the mean of the products:

    A = [p₁s₁·A₁; …; p_K s_K·A_K],    B = [B₁ … B_K]    ⇒    B A = Σ pₖ sₖ·Bₖ Aₖ

All of it goes to every client, which lays it over its base and starts another adapter. Bytes of a client and a round: b·rₖ(m+n) up,
b·Σⱼ rⱼ(m+n) down.
Deviations: the stack stays a frozen term over the base, where the paper adds it to the weights, so that a quantized base keeps its codes; of
more rank than the matrix has, or than `cap`, it is kept in its best triples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from finebits.errors import Invalid
from finebits.federate.base import Aggregated, Sent, Server, Usual, by_module, check, laid, shares, stacked


@dataclass(frozen=True)
class FLoRA(Usual):
    """The stack of all adapters over the base, and new ones to train. `cap` is the largest rank of what lies over a matrix after any number of
    rounds; None keeps all of it.

    >>> one = Sent({"q": {"A": torch.ones(1, 4), "B": torch.ones(4, 1)}}, 1)
    >>> two = Sent({"q": {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}}, 1)
    >>> made = FLoRA()(Server({}), [one, two]).server
    >>> made.tensors, made.residual["q"]["B"] @ made.residual["q"]["A"]  # ½ · 1 + ½ · 2
    ({}, tensor([[1.5000, 1.5000, 1.5000, 1.5000],
            [1.5000, 1.5000, 1.5000, 1.5000],
            [1.5000, 1.5000, 1.5000, 1.5000],
            [1.5000, 1.5000, 1.5000, 1.5000]]))
    """

    cap: int | None = None
    ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.cap is not None and self.cap < 1:
            raise Invalid(f"cap is {self.cap}; it must be at least 1")

    def __call__(self, server: Server, sent: Sequence[Sent]) -> Aggregated:
        check(self, sent)
        p = shares(sent)

        def stack(name: str) -> dict:
            made = stacked(sent, p, name)
            return {"B": made.B, "A": made.A}

        down = by_module(sent, stack)
        return Aggregated(Server({}, laid(server.residual, down, self.cap)), down)
