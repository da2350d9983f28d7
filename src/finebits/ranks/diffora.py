"""DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection.  Jiang et al., 2025.  arXiv:2502.08905v2.

Which modules get an adapter at all: every adapter's branch is multiplied by a gate sigmoid(a_l), adapters learn from training rows and the
gates from validation rows in turn, and the modules with the largest gates within the budget keep their adapters:

    y = y₀ + sigmoid(a_l)·(ΔW_l x),    min_a L_val(w*(a), a),    w*(a) = argmin_w L_train(w, a)    (first order: one step of each, by turns)

y₀ is what the module does without its update: the base alone, inputs smoothed where they are; or the start, where an initialiser took out of
the base what the adapter then holds (pissa, svdquant, …), so that a closed gate leaves the weight and not a part of it.
Deviations: no code was published, and what the abstract leaves open is this project's choice: gates are independent of each other, not a
softmax over a layer's modules, and modules that are left out get nothing (the paper's share one low-rank pair for each kind of module).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finebits.adapters.base import identity
from finebits.plan.base import Option
from finebits.plan.knapsack import hull
from finebits.ranks import base

ADAPTER = "default"  # the one that is searched for: the last that is laid over a module


@dataclass(frozen=True)
class DiffoRA:
    """Adapters where the gates are largest. `rate` is Adam's for the gates, `start` the gates' a at the beginning of a search.

    >>> planner = fb.DiffoRA()
    >>> menu = planner.menu({"a": 0.9, "b": 0.2}, fb.LoRA(rank=4))  # gates
    >>> {name: o.spec.adapter is not None for name, o in planner(menu, 1).items()}  # one module gets an adapter
    {'a': True, 'b': False}
    """

    rate: float = 0.05
    start: float = 0.0

    def menu(
        self, gates: Mapping[str, float], adapter: Any, price: base.Price = lambda name, rank: int(rank > 0)
    ) -> dict[str, list[Option]]:
        """Gates as options, an adapter or none. The budget is the number of modules, or what `price` counts."""
        return base.menu({name: {0: float(g), adapter.rank: 0.0} for name, g in gates.items()}, adapter, price)

    def __call__(self, menu: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
        return hull(menu, budget)

    def search(
        self,
        model: nn.Module,
        hosts: Mapping[str, Any],
        rounds: Iterable[tuple[Any, Any]],
        loss: Callable[[nn.Module, Any], Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, float]:
        """The gates of a built model's `hosts` after `rounds` of (training batch, validation batch); `optimizer` moves the adapters.

        The model's adapters are trained on the way. Modules come back as they were, without gates.
        """
        a = {name: nn.Parameter(torch.tensor(self.start)) for name in hosts}
        upper = torch.optim.Adam(a.values(), lr=self.rate)

        plan = getattr(model, "finebits_plan", None)

        def gated(name: str, host: Any) -> Callable[..., Tensor]:
            begun, moved = host.tensors(ADAPTER), plan is not None and name in plan.modules and plan.modules[name].init.moves
            begun = {k: v.detach().clone() for k, v in begun.items()} if moved else {}

            def run(host: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
                over = host.stack(out.dtype)  # the adapter over all that it lies on
                still = {k: v.to(out.dtype) for k, v in begun.items()} or over.p | {"B": torch.zeros_like(over.p["B"])}
                y0 = over._replace(p=still, base=over.base._replace(drop=identity))(inputs[0])
                return y0 + torch.sigmoid(a[name]) * (out - y0)

            return run

        hooks = [host.register_forward_hook(gated(name, host)) for name, host in hosts.items()]
        try:
            for seen, held in rounds:
                for batch, mover in ((seen, optimizer), (held, upper)):
                    optimizer.zero_grad(set_to_none=True)
                    upper.zero_grad(set_to_none=True)
                    loss(model, batch).backward()
                    mover.step()
        finally:
            for hook in hooks:
                hook.remove()
            optimizer.zero_grad(set_to_none=True)
        return {name: float(torch.sigmoid(v.detach())) for name, v in a.items()}
