"""A built model in float32 arithmetic with the weights that it has: what two models are compared in when rounding must not be the subject.

A quantized weight counts as its dequantization in its own dtype, which is what training multiplied with; every other tensor as its value;
adapters are their float32 masters and run their own `forward`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from finebits.adapters.base import Base, Over
from finebits.build import Adapted, hosts
from finebits.qtensor import dense


def exact(host: Adapted) -> Callable[[Tensor], Tensor]:
    """The map of a host in float32, whatever the dtype of its input."""

    def forward(input: Tensor) -> Tensor:
        bias = None if host.bias is None else host.bias.float()
        layer: Base | Over = Base(dense(host.weight).float(), bias)
        for name in host.active:
            layer = Over(host.kinds[name], host.tensors(name, torch.float32), layer)
        return layer(input.float())

    return forward


@contextlib.contextmanager
def float32(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes as this file's head says; afterwards everything is as it was. For evaluation: dropout is not applied.

    Peak memory above the model: float32 copies of what is not in a host, and two of the largest host's weight.
    """
    held: list[tuple[Tensor, Tensor]] = []
    swapped: list[Adapted] = []
    try:
        skip = {id(t) for _, host in hosts(model) for t in (host.weight, *host.p.parameters())}
        for t in [*model.parameters(), *model.buffers()]:
            if id(t) not in skip and t.is_floating_point() and t.dtype != torch.float32:
                held.append((t, t.data))
                t.data = t.data.float()
        for _, host in hosts(model):
            host.forward = exact(host)  # type: ignore[method-assign]
            swapped.append(host)
        yield model
    finally:
        for t, data in held:
            t.data = data
        for host in swapped:
            del host.__dict__["forward"]
