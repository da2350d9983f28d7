"""What of a module is served: its weight, which an adapter may make in codes, and what lies beside that."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from finebits.adapters.base import Codes
from finebits.build import Adapted
from finebits.carrier import Carrier
from finebits.lookup import Lookup


def served(host: Adapted | Lookup) -> Tensor:
    """The weight of a layer as it is served beside what `beside` names: codes that its adapter makes, or its own;
    that of a table.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(adapter=fb.L4Q(bits=3, block=64))}))
    >>> type(model[0].weight.data).__name__, served(model[0]).format.bits
    ('Tensor', 3)
    """
    if not isinstance(host, Adapted) or not host.active or host.kinds[first := host.active[0]].form != "codes":
        return host.weight
    with torch.no_grad():
        return cast(Codes, host.kinds[first]).coded(host.tensors(first), host.weight)


def beside(host: Adapted | Carrier) -> list[str]:
    """The active adapters that lie beside the weight as it is served.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    >>> beside(fb.build(model, fb.Plan({"0": fb.Spec(adapter=fb.L4Q(block=64))}))[0])  # it is the weight
    []
    """
    return [a for a in host.active if host.kinds[a].form != "codes"]
