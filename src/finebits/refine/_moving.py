"""What a refinement moves in a module that is built, and what the module computes with meanwhile: weights dense, or under scales that learn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from finebits.build import Adapted, vectors
from finebits.qtensor import QTensor
from finebits.refine._scales import ClippedWeight, ScaledWeight
from finebits.refine.base import Refine


@contextlib.contextmanager
def moved(
    module: nn.Module, refine: Refine, dense: bool = True, originals: Mapping[Adapted, Tensor] | None = None
) -> Iterator[tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """The tensors that a refinement moves, and what it moves the scales of weights by; nothing else of the module wants a gradient meanwhile.
    Weights are dense meanwhile where `dense` says so; `originals` are those that were quantized."""
    moves = refine.moves
    adapters = [p for p in module.parameters() if p.requires_grad]
    tensors = (adapters if "adapters" in moves else []) + (list(vectors(module).values()) if "vectors" in moves else [])
    still = [] if "adapters" in moves else adapters
    for p in still:
        p.requires_grad_(False)
    try:
        if "scales" in moves or "clips" in moves:
            with _learning(module, originals if "clips" in moves else None) as scales:
                yield tensors, scales
        else:
            with decoded(module) if dense else contextlib.nullcontext():
                yield tensors, []
    finally:
        for p in still:
            p.requires_grad_(True)


def _packed(module: nn.Module) -> dict[Adapted, QTensor]:
    """The hosts of quantized weights, with these."""
    return {h: h.weight for h in module.modules() if isinstance(h, Adapted) and isinstance(h.weight, QTensor)}


@contextlib.contextmanager
def decoded(module: nn.Module) -> Iterator[None]:
    """Quantized weights in the module's hosts are dense for a while."""
    packed = _packed(module)
    try:
        for h, q in packed.items():
            h.weight = nn.Parameter(q.detach().dequantize(), requires_grad=False)
        yield
    finally:
        for h, q in packed.items():
            h.weight = q


@contextlib.contextmanager
def _learning(module: nn.Module, originals: Mapping[Adapted, Tensor] | None) -> Iterator[list[nn.Parameter]]:
    """Quantized weights are decoded anew, under scales that learn, or rounded anew from `originals`, whenever their hosts are called; in the end
    they are what was learned."""
    packed = _packed(module)
    coded = {h: cast(QTensor, q.detach()) for h, q in packed.items()}
    learning = {h: ScaledWeight(q) if originals is None else ClippedWeight(q, originals[h].detach()) for h, q in coded.items()}
    hooks = []
    for h, one in cast(Mapping[Any, Any], learning).items():  # torch says less of what hooks and modules hold
        hooks.append(h.register_forward_pre_hook(lambda h, _, one=one: h._parameters.update(weight=one.dense())))
        hooks.append(h.register_forward_hook(lambda h, *_: h._parameters.update(weight=packed[h]), always_call=True))
    try:
        yield [p for one in learning.values() for p in one.tensors]
    finally:
        for hook in hooks:
            hook.remove()
        for h, one in learning.items():
            h.weight = nn.Parameter(one.packed(), requires_grad=False)
