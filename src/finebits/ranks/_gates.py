"""Gates before adapters: what each module gets of its adapter's update while a search looks at what that is worth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from finebits.adapters.base import identity

ADAPTER = "default"  # the one that is searched for: the last that is laid over a module


@contextlib.contextmanager
def gates(model: nn.Module, hosts: Mapping[str, Any], gate: Callable[[str], Tensor]) -> Iterator[None]:
    """y = y₀ + gate ∘ (update of x) in every host, whose gate is a number or one for each of its outputs. y₀ is what the module does without its
    update: the base alone, inputs smoothed where they are; or the start, where an initialiser took out of the base what the adapter then holds
    (pissa, svdquant, …), so that a closed gate leaves the weight and not a part of it."""
    origin = getattr(model, "finebits", None)  # what a built model carries

    def gated(name: str, host: Any) -> Callable[..., Tensor]:
        initial, moved = host.tensors(ADAPTER), origin is not None and origin.plan.modules[name].init.moves
        initial = {k: v.detach().clone() for k, v in initial.items()} if moved else {}

        def run(host: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            over = host.stack(out.dtype)  # the adapter over all that it lies on
            still = {k: v.to(out.dtype) for k, v in initial.items()} or over.p | {"B": 0 * over.p["B"].detach()}
            y0 = over._replace(p=still, base=over.base._replace(drop=identity))(inputs[0])
            return y0 + gate(name) * (out - y0)

        return run

    hooks = [host.register_forward_hook(gated(name, host)) for name, host in hosts.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
