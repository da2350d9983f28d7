"""DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection.  Jiang et al., 2025.  arXiv:2502.08905v2.
Use it where only some modules are worth an adapter: gates that are trained on held-out rows say which.

Which modules get an adapter at all: every adapter's branch is multiplied by a gate sigmoid(a_l), adapters learn from training rows and the
gates from validation rows in turn, and the modules with the largest gates within the budget keep their adapters:

    y = y₀ + sigmoid(a_l)·(ΔW_l x),    min_a L_val(w*(a), a),    w*(a) = argmin_w L_train(w, a)    (first order: one step of each, by turns)

`search` takes one step of each by turns, `passes` times through the rows; a gate starts at a = `start` and moves at `rate` (Adam's), adapters
at `adapter_rate`. y₀ is what the module does without its update (_gates.py).
Modules that keep none share one low-rank pair for each shape (adapter `shared_lora`, of rank `pair`), or get nothing where that is 0.
Deviations: no code was published, and what the abstract leaves open is this project's choice: gates are independent of each other, not a
softmax over a layer's modules; pairs are shared by shape, where the paper does so by kind of module. The search runs on the unquantized
model, all of it in memory, with adapters that start at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from finebits import registry
from finebits.errors import Invalid
from finebits.plan.base import Option, Spec
from finebits.ranks import base
from finebits.ranks._gates import gates


@dataclass(frozen=True)
class DiffoRA(base.Ranking):
    """Adapters on the `share` of the modules where the gates are largest.

    >>> planner = fb.DiffoRA()
    >>> menu = planner.menu({"a": 0.9, "b": 0.2}, fb.LoRA(rank=4))  # gates
    >>> {name: o.spec.adapter is not None for name, o in planner(menu, 1).items()}  # one module gets an adapter
    {'a': True, 'b': False}
    """

    share: float = 0.5
    passes: int = 4
    rate: float = 0.05
    adapter_rate: float = 1e-3
    start: float = 0.0
    pair: int = 0
    searches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise Invalid(f"share is {self.share}; it is the share of the modules that keep an adapter, above 0 and at most 1")
        if self.passes < 1:
            raise Invalid(f"passes is {self.passes}; the search goes through the rows at least once")
        if self.pair < 0:
            raise Invalid(f"pair is {self.pair}; it is the rank of what left-out modules share, and 0 gives them nothing")

    def menu(
        self, gates: Mapping[str, float], adapter: Any, price: base.Price = lambda name, rank: int(rank > 0)
    ) -> dict[str, list[Option]]:
        """Gates as options, an adapter or none. The budget is the number of modules, or what `price` counts.

        >>> [(o.bytes, o.loss) for o in fb.DiffoRA().menu({"a": 0.9}, fb.LoRA(rank=4))["a"]]  # without an adapter its gate is lost
        [(0, 0.9), (1, 0.0)]
        >>> [o.spec.adapter for o in fb.DiffoRA(pair=2).menu({"a": 0.9}, fb.LoRA(rank=4, alpha=8.0))["a"]]
        [SharedLoRA(rank=2, alpha=4.0), LoRA(rank=4, alpha=8.0, scaling='lora')]
        """
        own = base.menu({name: {0: float(g), adapter.rank: 0.0} for name, g in gates.items()}, adapter, price)
        if not self.pair:
            return own
        pair = registry.load("adapters", "shared_lora")(rank=self.pair, alpha=self.pair * getattr(adapter, "s", 1.0))
        return {name: [replace(o, spec=Spec(adapter=o.spec.adapter or pair)) for o in options] for name, options in own.items()}

    def budget(self, adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return max(1, round(self.share * len(shapes)))

    def search(
        self, model: nn.Module, hosts: Mapping[str, Any], train: base.Batches, held: base.Batches, loss: base.Loss
    ) -> dict[str, float]:
        """The gates of a built model's `hosts`, which come back as they were but for what their adapters have learned."""
        a = {name: nn.Parameter(torch.tensor(self.start, device=host.weight.device)) for name, host in hosts.items()}
        upper = torch.optim.Adam(a.values(), lr=self.rate)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=self.adapter_rate)

        with gates(model, hosts, lambda name: torch.sigmoid(a[name])):
            for train_batch, held_batch in self.passes * list(zip(train, held, strict=True)):
                for batch, mover in ((train_batch, optimizer), (held_batch, upper)):
                    optimizer.zero_grad(set_to_none=True)
                    upper.zero_grad(set_to_none=True)
                    loss(model, batch).backward()
                    mover.step()
        optimizer.zero_grad(set_to_none=True)
        return {name: float(torch.sigmoid(v.detach())) for name, v in a.items()}
