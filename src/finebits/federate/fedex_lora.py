"""FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models.
Singhal, Ponkshe, Vepakomma, ACL 2025 (acl-long.67).

Factors are averaged, and what that misses goes over the frozen weight:

    Ā = Σ pₖ Aₖ,  B̄ = Σ pₖ Bₖ,    ΔW_res = s (Σ pₖ Bₖ Aₖ − B̄ Ā) = s Σ pₖ (Bₖ − B̄)(Aₖ − Ā),    W ← W + ΔW_res

Since Σ pₖ (Bₖ − B̄) = 0, the residual is s Σ_{k<K} pₖ (Bₖ − B̄)(Aₖ − A_K), of rank (K−1)r at most; it is sent as these factors. Bytes of
a client and a round: b·r(m+n) up, b·K·r(m+n) down; with `rank` b·(r + rank)(m+n).
Deviations: clients weigh as they have examples, where the paper takes the plain mean; the residual stays a frozen term over the base, where the
paper adds it to the weights, so that a quantized base keeps its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finebits.errors import Invalid
from finebits.federate.base import Aggregated, Sent, Server, Usual, by_module, check, laid, mean, shares


@dataclass(frozen=True)
class FedExLoRA(Usual):
    """The mean of the factors, and what it misses. `rank` is the largest rank of a round's residual (the paper's best inexact variant); None is
    exact.

    >>> one = Sent({"q": {"A": torch.tensor([[1.0, 0.0]]), "B": torch.tensor([[1.0], [0.0]])}}, 1)
    >>> two = Sent({"q": {"A": torch.tensor([[0.0, 1.0]]), "B": torch.tensor([[0.0], [1.0]])}}, 1)
    >>> tensors, residual = FedExLoRA()(Server({}), [one, two]).server
    >>> tensors["q"]["B"] @ tensors["q"]["A"] + residual["q"]["B"] @ residual["q"]["A"]  # the mean of the products
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise Invalid(f"rank is {self.rank}; it must be at least 1")

    def __call__(self, server: Server, sent: Sequence[Sent]) -> Aggregated:
        check(self, sent)
        p = shares(sent)
        averaged, *others, last = mean(sent, p), *sent
        if not others:
            return Aggregated(Server(averaged, server.residual), averaged)

        def missed(name: str) -> dict:
            mean_B, A_K = averaged[name]["B"].double(), last.tensors[name]["A"].double()
            B = torch.cat([s.tensors[name]["B"].double() - mean_B for s in others], 1)
            A = torch.cat([w * s.scale * (s.tensors[name]["A"].double() - A_K) for s, w in zip(others, p, strict=False)])
            return {"B": B.float(), "A": A.float()}

        residual = laid({}, by_module(sent, missed), self.rank)
        down = {name: averaged[name] | {f"residual.{k}": t for k, t in residual[name].items()} for name in averaged}
        return Aggregated(Server(averaged, laid(server.residual, residual)), down)
