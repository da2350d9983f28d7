"""What a refinement moves in a module that is built, and what the module computes with meanwhile: weights dense, or made of what learns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from finebits.build import Adapted, vectors
from finebits.qtensor import QTensor
from finebits.refine._latent import LatentWeight
from finebits.refine._scales import ClippedWeight, ScaledWeight
from finebits.refine._words import WordedWeight
from finebits.refine.base import Refine


class Moved(NamedTuple):
    """What a refinement moves, as a Matching has it."""

    tensors: list[nn.Parameter]
    scales: list[nn.Parameter] = []
    words: list[WordedWeight] = []


@contextlib.contextmanager
def moved(module: nn.Module, refine: Refine, dense: bool = True, originals: Mapping[Adapted, Tensor] | None = None) -> Iterator[Moved]:
    """What a refinement moves of a module; nothing else of it wants a gradient meanwhile. Weights are dense meanwhile where `dense` says so;
    `originals` are those that were quantized."""
    moves = refine.moves
    adapters = [p for p in module.parameters() if p.requires_grad]
    tensors = (adapters if "adapters" in moves else []) + (list(vectors(module).values()) if "vectors" in moves else [])
    still = [] if "adapters" in moves else adapters
    for p in still:
        p.requires_grad_(False)
    try:
        if moves & LEARNERS.keys():
            with _learning(module, next(LEARNERS[m] for m in LEARNERS if m in moves), originals or {}) as found:
                yield found._replace(tensors=tensors + found.tensors)
        else:
            with decoded(module) if dense else contextlib.nullcontext():
                yield Moved(tensors)
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


LEARNERS: dict[str, Callable[[QTensor, Tensor | None], Any]] = {  # by what a refinement moves; of several, the first
    "weights": lambda q, W: LatentWeight(q, cast(Tensor, W)),
    "words": lambda q, _: WordedWeight(q),
    "clips": lambda q, W: ClippedWeight(q, cast(Tensor, W)),
    "scales": lambda q, _: ScaledWeight(q),
}


@contextlib.contextmanager
def _learning(module: nn.Module, learner: Callable[[QTensor, Tensor | None], Any], originals: Mapping[Adapted, Tensor]) -> Iterator[Moved]:
    """Quantized weights are made anew of what learns of them whenever their hosts are called; in the end they are what was learned."""
    packed = _packed(module)
    learning = {h: learner(cast(QTensor, q.detach()), None if h not in originals else originals[h].detach()) for h, q in packed.items()}
    hooks = []
    for h, one in cast(Mapping[Any, Any], learning).items():  # torch says less of what hooks and modules hold
        hooks.append(h.register_forward_pre_hook(lambda h, _, one=one: h._parameters.update(weight=one.dense())))
        hooks.append(h.register_forward_hook(lambda h, *_: h._parameters.update(weight=packed[h]), always_call=True))
    each = list(learning.values())
    try:
        yield Moved(
            [p for one in each if isinstance(one, LatentWeight) for p in one.latent],
            [p for one in each for p in one.tensors],
            [one for one in each if isinstance(one, WordedWeight)],
        )
    finally:
        for hook in hooks:
            hook.remove()
        for h, one in learning.items():
            h.weight = nn.Parameter(one.packed(), requires_grad=False)
