"""CoLoRA: Contribution-based Low-Rank Adaptation with Pre-training Model for Real Image Restoration (the ranks).  Park et al., ECCV 2024.
arXiv:2408.01099v1.
Use it where rows are there to train on twice, and some layers matter much more than others: each gets a rank by what it contributed to
learning.

Between the pretrained weights W⁰ and trained ones W¹, the contribution of layer l, filter (row) by filter, is the integral along the way
(FAIG):

    C_l = Σ_rows |Σ_{t=1..T} ⟨∂L/∂W_l(W⁰ + τ_t (W¹ − W⁰)), W_l¹ − W_l⁰⟩_row / T|,    τ_t = (t − ½)/T

Signed and summed over everything it is L(W¹) − L(W⁰). W¹ is what adapters over all matrices have learned after `passes` times through the
rows, and with row gates c before their update, ∂L/∂c_i at c = τ_t is the product above: no gradient of a whole weight is formed. One of few
`points` is the cheap proxy, gradient times change in the middle of the way. As a menu, out of a small set of ranks:

    loss_l(r) = C_l · r0 / r        so that the best ranks grow with the root of C_l

Deviations: what the paper does between contributions and ranks could not be read in detail, and the menu is this project's, as for
`lamda_pp`; the points are the middles of T equal parts, where the paper takes their ends; W¹ is of trained adapters and not of a model that
is trained whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.plan.base import Option
from finebits.ranks import base
from finebits.ranks._gates import gates


@dataclass(frozen=True)
class CoLoRA(base.Ranking):
    """`factors` times the adapter's rank is the set of ranks; adapters learn at `rate` before they are looked at.

    >>> planner = fb.CoLoRA()
    >>> menu = planner.menu({"a": 0.9, "b": 0.1, "c": 0.1}, fb.LoRA(rank=4))  # contributions
    >>> {name: o.bytes for name, o in planner(menu, 12).items()}
    {'a': 8, 'b': 2, 'c': 2}
    """

    points: int = 8
    passes: int = 4
    rate: float = 1e-3
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    searches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.points < 1 or self.passes < 1:
            raise Invalid(f"points is {self.points} and passes is {self.passes}; there must be one of each or more")

    def menu(self, contributions: Mapping[str, float], adapter: Any, price: base.Price = base.units) -> dict[str, list[Option]]:
        """C by module as options. The budget is then adapter.rank · len(contributions).

        >>> [(o.bytes, o.loss) for o in fb.CoLoRA().menu({"a": 0.8}, fb.LoRA(rank=4))["a"]]  # .8 · 4 / r
        [(2, 1.6), (4, 0.8), (8, 0.4)]
        """
        ranks = sorted({max(1, round(f * adapter.rank)) for f in self.factors})
        return base.menu({name: {r: c * adapter.rank / r for r in ranks} for name, c in contributions.items()}, adapter, price)

    def search(
        self, model: nn.Module, hosts: Mapping[str, Any], train: base.Batches, held: base.Batches, loss: base.Loss
    ) -> dict[str, float]:
        """C of a built model's `hosts`, which come back with what their adapters have learned."""
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=self.rate)
        for batch in self.passes * list(train):
            optimizer.zero_grad(set_to_none=True)
            loss(model, batch).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {name: float(rows.abs().sum()) for name, rows in self.attributed(model, hosts, held, loss).items()}

    def attributed(self, model: nn.Module, hosts: Mapping[str, Any], batches: base.Batches, loss: base.Loss) -> dict[str, Tensor]:
        """Of the change of the loss on these rows from W⁰ to W¹, the part of every row of every host's weight."""
        m = {name: host.weight.shape[0] for name, host in hosts.items()}
        c = {name: torch.zeros(m[name], device=host.weight.device, requires_grad=True) for name, host in hosts.items()}
        found = {name: torch.zeros_like(gate) for name, gate in c.items()}
        with gates(model, hosts, lambda name: c[name]):
            for t in range(self.points):
                for gate in c.values():
                    gate.data.fill_((t + 0.5) / self.points)
                for batch in batches:
                    parts = torch.autograd.grad(loss(model, batch), list(c.values()), allow_unused=True)
                    for name, part in zip(c, parts, strict=True):
                        if part is not None:
                            found[name] += part / (self.points * len(batches))
        return found
