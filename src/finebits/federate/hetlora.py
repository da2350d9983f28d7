"""HetLoRA: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models.  Cho et al., EMNLP 2024.

The server holds the largest rank, and a client of rank rₖ starts from the first rₖ rows of A and columns of B. Its training prunes its rank: the
last of them, from γ·rₖ on, are punished, and where that has made them smaller than they were they are not sent:

    F(A, B) + λ Σ ‖B_{:, γr:r}‖·‖A_{γr:r, :}‖

Aggregation fills with zeros up to the largest rank and weighs by what clients have learned:

    A ← Σ ωₖ [Aₖ; 0],   B ← Σ ωₖ [Bₖ 0],    ωₖ = ‖Bₖ Aₖ‖ / Σⱼ ‖Bⱼ Aⱼ‖

Bytes of a client and a round: b·rₖ(m+n) up, the same down.
Deviations: one rank for all modules of a client, by the sum of their norms; where nobody has learned anything, all weigh alike. Numbers of
examples do not count, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.federate.base import Aggregated, Sent, Server, Tensors, Usual, check, cut, frobenius, mean
from finebits.rules.base import Rule, Run


@dataclass(frozen=True)
class HetLoRA(Usual):
    """Zeros up to the largest rank, weights by norms, ranks that shrink. γ = `share` of 1 prunes nothing; λ is `penalty`.

    >>> one, two = (Sent({"q": {"A": torch.ones(r, 2), "B": torch.ones(2, r)}}, 1) for r in (1, 3))
    >>> HetLoRA()(Server({"q": {"A": torch.zeros(4, 2), "B": torch.zeros(2, 4)}}), [one, two]).server.tensors["q"]["B"]  # ¼ and ¾
    tensor([[1.0000, 0.7500, 0.7500, 0.0000],
            [1.0000, 0.7500, 0.7500, 0.0000]])
    """

    share: float = 0.99
    penalty: float = 0.01
    ranks: ClassVar[bool] = True
    cuts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and self.penalty >= 0):
            raise Invalid(f"share is {self.share} and penalty {self.penalty}: a share is above 0 and at most 1, a penalty at least 0")

    def rules(self) -> tuple[Rule, ...]:
        return (Tail(self.share, self.penalty),) if self.penalty and self.share < 1 else ()

    def kept(self, start: Tensors, trained: Tensors) -> Tensors:
        rank = max(len(p["A"]) for p in trained.values())
        first = max(math.floor(self.share * rank), 1)
        tails = [float(sum((tail(p, self.share) for p in of.values()), torch.zeros(()))) for of in (start, trained)]
        return cut(trained, first) if first < rank and tails[1] < tails[0] else trained

    def __call__(self, server: Server, sent: Sequence[Sent]) -> Aggregated:
        check(self, sent)
        norms = [math.sqrt(sum(frobenius(p["B"], p["A"]) ** 2 for p in s.tensors.values())) for s in sent]
        total = sum(norms)
        weights = [n / total for n in norms] if total > 0 else [1 / len(sent)] * len(sent)
        most = max([s.rank for s in sent] + [len(p["A"]) for p in server.tensors.values()])
        made = mean([s._replace(tensors={name: _padded(p, most) for name, p in s.tensors.items()}) for s in sent], weights)
        return Aggregated(Server(made, server.residual), made)


class Tail(Rule):
    """The penalty of a client's training: λ times the norms of the last ranks of B and of A."""

    def __init__(self, share: float, weight: float) -> None:
        self.share, self.weight = share, weight

    def penalty(self, run: Run) -> Tensor | float:
        trained = [host.tensors("default") for host in run.hosts.values() if "default" in host.kinds]
        return self.weight * torch.stack([tail(p, self.share) for p in trained]).sum()


def tail(p: Params, share: float) -> Tensor:
    """‖B_{:, γr:}‖·‖A_{γr:, :}‖.

    >>> tail({"A": torch.ones(4, 1), "B": torch.ones(1, 4)}, 0.75)
    tensor(1.)
    """
    first = max(math.floor(share * len(p["A"])), 1)
    last_B, last_A = p["B"][:, first:], p["A"][first:]
    squares = last_B.square().sum() * last_A.square().sum()
    return torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)  # whose slope at 0 is no number


def _padded(p: Params, rank: int) -> Params:
    more = rank - len(p["A"])
    return {"A": F.pad(p["A"], (0, 0, 0, more)), "B": F.pad(p["B"], (0, more))}
