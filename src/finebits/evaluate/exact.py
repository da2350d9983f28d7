"""A built model in float32 arithmetic with the weights that it has: what two models are compared in when rounding must not be the subject.

A quantized weight counts as its dequantization in its own dtype, which is what training multiplied with; so do codes that an adapter makes
of it; every other tensor as its value;
adapters are their float32 masters and run their own `forward`. Embeddings are looked up as they are held, and what was looked up is float32:
a copy of the largest tensors of a model would change nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finebits.adapters.base import Base, Over
from finebits.build import Adapted, hosts
from finebits.carrier import Following, tables
from finebits.lookup import is_linear
from finebits.qtensor import QTensor, dense
from finebits.served import beside, served

SLICE = 8192  # rows of a head that are float32 at a time


def exact(host: Adapted) -> Callable[[Tensor], Tensor]:
    """The map of a host in float32, whatever the dtype of its input.

    >>> host = fb.Adapted.over(torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16))
    >>> exact(host)(torch.ones(1, 2, dtype=torch.bfloat16)).dtype
    torch.float32
    """

    def forward(input: Tensor) -> Tensor:
        bias = None if host.bias is None else host.bias.float()
        layer: Base | Over = Base(dense(served(host)).float(), bias)
        for name in beside(host):
            layer = Over(host.kinds[name], host.tensors(name, torch.float32), layer)
        return layer(input.float())

    return forward


@contextlib.contextmanager
def float32(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes as this file's head says; afterwards everything is as it was. For evaluation: dropout is not applied.

    Peak memory above the model: float32 copies of norms and other small tensors, and two of the largest host's weight.

    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(2, dtype=torch.bfloat16))
    >>> with float32(model):
    ...     print(model[0].weight.dtype)
    torch.float32
    >>> model[0].weight.dtype
    torch.bfloat16
    """
    saved: list[tuple[Tensor, Tensor]] = []
    swapped: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, i, out: out.float()) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        skip = {id(t) for _, host in hosts(model) for t in (host.weight, *host.p.parameters())} | ends(model)
        for t in [*model.parameters(), *model.buffers()]:
            if id(t) not in skip and t.is_floating_point() and t.dtype != torch.float32:
                saved.append((t, t.data))
                t.data = t.data.float()
        for _, host in hosts(model):
            host.forward = exact(host)  # pyright: ignore[reportAttributeAccessIssue]
            swapped.append(host)
        for host in tables(model).values():
            host.exact = True
        for module in model.modules():
            if isinstance(module, Following):
                module.forward = followed(module)  # pyright: ignore[reportAttributeAccessIssue]
                swapped.append(module)
        if (head := plain_head(model)) is not None:
            head.forward = lambda h: product(h, head.weight, head.bias)  # pyright: ignore[reportAttributeAccessIssue]
            swapped.append(head)
        yield model
    finally:
        for t, data in saved:
            t.data = data
        for host in swapped:
            del host.__dict__["forward"]
        for host in tables(model).values():
            host.exact = False
        for hook in hooks:
            hook.remove()


def product(h: Float[Tensor, "*p h"], weight: Float[Tensor, "v h"], bias: Tensor | None = None) -> Float[Tensor, "*p v"]:
    """h Wᵀ + b in float32, whatever the weight is held in: SLICE rows of it are float32 at a time.

    >>> product(torch.ones(1, 2), torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), torch.tensor([0.5]))
    tensor([[3.5000]])
    """
    h = h.to(weight.device).float()
    if weight.dtype == torch.float32 and not isinstance(weight, QTensor):
        return F.linear(h, weight, None if bias is None else bias.float())
    z = h.new_empty(*h.shape[:-1], len(weight))
    for a in range(0, len(weight), SLICE):
        z[..., a : a + SLICE] = F.linear(h, dense(weight[a : a + SLICE]).float())
    return z if bias is None else z.add_(bias.float())


class Sliced(Base):
    """A base that multiplies as `product` does, and no other way.

    >>> Sliced(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))(torch.ones(1, 2))
    tensor([[3.]])
    """

    @property
    def frozen(self) -> bool:
        return False  # what is, is multiplied with its adapter in one step

    def __call__(self, x: Float[Tensor, "*t n"]) -> Float[Tensor, "*t m"]:
        return product(x, self.weight, self.bias)


def followed(head: Following) -> Callable[[Tensor], Tensor]:
    """The map, in float32, of a head that follows the adapters of a table."""
    return lambda h: head.over(Sliced(head.weight, head.bias), torch.float32)(h.float())


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The output head where it is a linear layer and nothing more.

    >>> plain_head(torch.nn.Linear(2, 2)) is None  # no transformers model, so it has no output head
    True
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return cast(nn.Linear, head) if is_linear(head) else None


def ends(model: nn.Module) -> set[int]:
    """The tensors of embeddings and of a plain output head: they are looked up, or multiplied in slices, and never copied.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 2), torch.nn.Linear(2, 2))
    >>> ends(model) == {id(model[0].weight)}
    True
    """
    head = plain_head(model)
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | (set() if head is None else {id(head.weight)})
