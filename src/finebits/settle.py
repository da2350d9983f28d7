"""What a trained model needs of its adapters, without what only training needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from finebits import registry
from finebits.build import Built, built
from finebits.carrier import carriers


def settle(model: nn.Module) -> nn.Module:
    """Put what encoders make in their place, where adapters train through one (p_tuning, prefix_tuning with hidden units): in place, and for
    good. Save before, to go on training.

    >>> fb.settle(torch.nn.Linear(2, 2))  # has none
    Linear(in_features=2, out_features=2, bias=True)
    """
    over: dict[str, Any] = {}
    for name, host in carriers(model):
        for key in list(host.active):
            adapter: Any = host.kinds[key]
            if hasattr(adapter, "settled"):
                with torch.no_grad():
                    data, tensors = adapter.settled(host.tensors(key))
                host.remove(key)
                settled = registry.from_json("adapters", data)
                host.add(key, settled, torch.Generator(), {k: t.detach().clone() for k, t in tensors.items()})
                over[name] = settled
    origin = built(model)
    if origin is not None and over:
        plan = replace(origin.plan, over=origin.plan.over | over)
        model.finebits = Built(plan, origin.vectors, origin.choices, origin.refined)  # pyright: ignore[reportArgumentType]
    return model
