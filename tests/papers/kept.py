"""What autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept(forward: Callable[[], Tensor], there: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that `forward` leaves for the backward pass, those of `there` aside: weights and other tensors that stay anyway."""
    old = {t.untyped_storage().data_ptr() for t in there}
    new: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in old:
            new[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    assert y.requires_grad
    return sum(new.values())
