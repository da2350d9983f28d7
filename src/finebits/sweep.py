"""Build a model block by block: with inputs from the blocks that are built already, and refined against the unquantized ones.

Two streams of states go through the model, one through the unquantized blocks, one through the built ones, each only where something asks for
it. A block's own weights are read when it is reached, and dense for as long as it is worked on; what remains in memory of the rest is packed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from finebits.build import Adapted, Progress, build, lay_over, needs, sign
from finebits.calibrate.blockwise import blocks_of, measure
from finebits.errors import Invalid
from finebits.plan.base import Plan, Spec
from finebits.qtensor import QTensor
from finebits.refine._movable import unmovable
from finebits.refine._moving import decoded, moved
from finebits.refine.base import Matching, Refine
from finebits.stats.base import Stats
from finebits.stream import Flow, Spill

INPUTS = ("built", "unquantized")


def sweep(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Tensor],
    *,
    stats: Mapping[str, Stats] | None = None,
    inputs: Literal["built", "unquantized"] = "built",
    refine: Sequence[Refine] = (),
    head: Callable[[Tensor], Tensor] | None = None,
    learned: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None,
    keep: Callable[[Any], Tensor | None] = lambda batch: None,
    keep_final: Callable[[Any], Tensor | None] | None = None,
    read: Callable[[str], Tensor] | None = None,
    dense: bool = False,
    progress: Progress = lambda done, total, name: None,
    watch: Callable[[str, list[float]], None] = lambda name, losses: None,
) -> nn.Module:
    """What `build` does, block by block, and with the statistics gathered on the way. Progress and `read` are as in `build`.

    `run(model, batch)` gives the final hidden states. Statistics of a block come from `inputs`: those that the built blocks before it give,
    or those of the unquantized model, as `collect` has them; `stats` are taken as they are where they are given, which those that need
    gradients must be. Refinements of a block follow when it is built, those of the whole model at the end, under checkpoints at every block;
    `head` makes outputs of final states, and `learned(batch, states)` gives the states (p, h) at which the batch says what follows, and that
    (p,), for those that ask for them. `keep(batch)` tells which of the states of blocks are no padding, `keep_final` which of the final ones,
    where these are others. `dense` holds all weights dense meanwhile, which is faster. `watch` is told the losses of every refinement, by block
    ("" for the model), whose means over the first and the last epoch are left on the model (`Built.refined`). Raises ValueError as `build` does,
    and where blocks cannot be found.

    >>> model = torch.nn.Sequential()
    >>> model.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)])
    >>> run = lambda model, x: model.layers[1](model.layers[0](x))
    >>> plan = fb.Plan({"layers.0": fb.Spec(fb.NF(4)), "layers.1": fb.Spec(fb.NF(4))})
    >>> built = fb.sweep(model, plan, [torch.randn(2, 64)], run)
    >>> [host.weight.bits_per_weight for _, host in fb.hosts(built)]
    [4.5, 4.5]
    """
    if inputs not in INPUTS:
        raise Invalid(f"inputs is {inputs!r}; it can be {' or '.join(INPUTS)}")
    if not batches:
        raise Invalid("a sweep needs calibration batches, and none came")
    if why := unmovable(refine, (spec.format for spec in plan.modules.values())):
        raise Invalid(why)
    names = blocks_of(model, plan.modules)
    supplied = {n: frozenset(s) for n, s in (stats or {}).items()}
    wanted = {n: w - supplied.get(n, frozenset()) for n, w in needs(plan).items()}
    dtype = getattr(torch, plan.levers.dtype)
    by_block = [r for r in refine if r.scope == "block"]
    by_model = [r for r in refine if r.scope == "model"]
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    refined: dict[str, tuple[float, float]] = {}

    def report(name: str, losses: list[float]) -> None:
        n = len(batches)
        refined[name] = sum(losses[:n]) / n, sum(losses[-n:]) / n
        watch(name, losses)

    done = 0

    def make(inside: Mapping[str, Spec], measured: Mapping[str, Stats]) -> None:
        nonlocal done
        available = {n: {**(stats or {}).get(n, {}), **measured.get(n, {})} for n in inside}
        build(model, replace(plan, modules=inside, over={}), available, progress=lambda i, _, n: progress(done + i, len(plan.modules), n))
        done += len(inside)

    flow = Flow(model, names, batches, run)
    mask = lambda i: keep(batches[i])  # noqa: E731
    theirs = flow.entered() if refine or inputs == "unquantized" else None
    tables = {n: s for n, s in plan.modules.items() if isinstance(model.get_submodule(n), nn.Embedding)}
    make(tables, {})  # what is built sees rows of these
    ours = flow.entered() if refine or inputs == "built" else None
    for name in names:
        block = model.get_submodule(name)
        inside = {n: s for n, s in plan.modules.items() if n.startswith(f"{name}.")}
        _read(model, inside, read, dtype)
        measured = measure(flow, name, cast(Spill, ours if inputs == "built" and ours is not None else theirs), wanted, mask)
        if theirs is not None:
            flow.walk(theirs, name)
        rounds = any(r.moves & {"clips", "weights"} for r in by_block)
        weights = {n: cast(Tensor, model.get_submodule(n).weight) for n in inside} if rounds else {}
        if coded := [n for n, W in weights.items() if isinstance(W, QTensor)]:
            raise Invalid(
                f"{coded[0]}: the weight is quantized already, and a refinement is to round it anew as it learns: let its scales learn instead"
            )
        make(inside, measured)
        if ours is None:
            continue
        originals = {cast(Adapted, model.get_submodule(n)): W for n, W in weights.items()}
        forward = lambda i, name=name, ours=ours: flow.through(name, i, ours[i])  # noqa: E731
        for r in by_block:
            with moved(block, r, originals=originals) as found:
                if found.tensors or found.scales:
                    goal = cast(Spill, theirs).__getitem__
                    report(name, r(Matching(forward, goal, batches=len(batches), keep=mask, **found._asdict())))
        with decoded(block):
            flow.walk(ours, name)
    left = {n: s for n, s in plan.modules.items() if n not in tables}
    if outside := {n: s for n, s in left.items() if not n.startswith(tuple(f"{name}." for name in names))}:
        _read(model, outside, read, dtype)
        make(outside, {})
    if by_model and theirs is not None:
        del ours
        flow.finish(theirs)
        known = None if learned is None else lambda i, states: learned(batches[i], states)
        last = mask if keep_final is None else lambda i: keep_final(batches[i])
        for r in by_model:
            step = lambda i, n, r=r: progress(done, len(plan.modules), f"{type(r).__name__} over the whole model, step {i} of {n}")  # noqa: E731
            report("", whole(flow, r, theirs, step, dense=dense, keep=last, head=head, learned=known))
    return sign(lay_over(model, plan), plan, refined=refined)


def whole(flow: Flow, r: Refine, theirs: Spill, step: Callable[[int, int], None], dense: bool = False, **more: Any) -> list[float]:
    """The losses of a refinement of the model that a flow goes through, under checkpoints at every block: it is to give the final states
    `theirs`. `step` is told which step begins, and of how many; `more` is what else a Matching has."""
    begun, total = itertools.count(1), getattr(r, "epochs", 1) * len(flow)

    def ours(batch: int) -> Tensor:
        step(min(next(begun), total), total)
        return flow.whole(batch)

    with moved(flow.model, r, dense) as found:
        return r(Matching(ours, theirs.__getitem__, batches=len(flow), **more, **found._asdict()))


def _read(model: nn.Module, modules: Mapping[str, Any], read: Callable[[str], Tensor] | None, dtype: torch.dtype) -> None:
    if read is not None:
        for n in modules:
            model.get_submodule(n).weight = nn.Parameter(read(n).to(dtype), requires_grad=False)
