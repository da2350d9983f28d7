"""One pass of a model over batches that gathers every statistic that a plan needs.

Modules that read the same tensor (q, k and v; gate and up) share one accumulator for statistics of the inputs alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finebits.errors import Invalid, Missing
from finebits.linears import expert
from finebits.stats.base import Statistic

Needs = Mapping[str, frozenset[type[Statistic]]]


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    needs: Needs,
    keep: Callable[[Any], Tensor | None] = lambda batch: None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[type[Statistic], Statistic]]:
    """{module: {Statistic class: statistic}} over all `batches`.

    `loss(model, batch)` runs the model and returns the *sum* of the losses of the batch's tokens (statistics are means over tokens).
    `keep(batch)` may give a boolean mask (*b,) over token positions: padding is left out where a module sees all of them. The model is run in
    eval mode with every parameter frozen; modes, `requires_grad` and gradients are put back. Raises KeyError for a module that the model lacks,
    and ValueError where a module never ran. An expert that no token was sent to is taken for one that an average token of its siblings' was.

    >>> model, batches = torch.nn.Sequential(torch.nn.Linear(2, 1)), [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]])]
    >>> stats = fb.collect(model, batches, lambda model, x: model(x).sum(), {"0": frozenset({fb.Gram})})
    >>> stats["0"][fb.Gram].value()  # E x xᵀ over two tokens
    tensor([[1., 1.], [1., 2.]])
    """
    modules = dict(model.named_modules())
    missing = [name for name in needs if name not in modules]
    if missing:
        raise Missing(f"the model has no module {missing[0]!r}; statistics were asked for it")
    collected: dict[str, dict[type[Statistic], Statistic]] = {name: {S: S() for S in wanted} for name, wanted in needs.items()}
    backward = any(S.backward for wanted in needs.values() for S in wanted)
    site: dict[str, str] = {}  # module -> the module whose inputs it shares
    seen: dict[int, tuple[Tensor, str]] = {}
    mask: list[Tensor | None] = [None]

    def rows(x: Tensor) -> Tensor:
        flat = x.detach().flatten(0, -2)
        if mask[0] is None or len(flat) != mask[0].numel():  # behind the blocks, where a row has one state
            return flat
        return flat[mask[0].flatten().to(flat.device)]

    def hook(name: str) -> Callable:
        def run(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            if name not in site:
                site[name] = seen.setdefault(id(x), (x, name))[1]
            owner = site[name]
            for S in needs[name]:
                if S.backward:
                    output.register_hook(lambda g, S=S: collected[name][S].add(rows(x), rows(g)))
                elif owner == name or S not in needs.get(owner, ()):
                    collected[name][S].add(rows(x))

        return run

    handles = [modules[name].register_forward_hook(hook(name)) for name in needs]
    modes = {m: m.training for m in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trained:
        p.requires_grad_(False)
    if backward:  # something must require a gradient for output gradients to exist
        handles.append(_entrance(model).register_forward_hook(lambda m, i, out: out.requires_grad_(), prepend=True))
    try:
        for done, batch in enumerate(batches):
            seen.clear()
            mask[0] = keep(batch)
            with torch.set_grad_enabled(backward):
                value = loss(model, batch)
                if backward:
                    value.backward()
            progress(done + 1)
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in modes.items():
            m.training = mode
        for p in trained:
            p.requires_grad_(True)
    for name in needs:
        owner = site.get(name)
        if owner is None and (others := _siblings(name, modules, site)):
            collected[name] = {S: _average([collected[o][S] for o in others if S in collected[o]]) for S in needs[name]}
            continue
        if owner is None:
            raise Invalid(f"module {name!r} never ran while statistics were collected; leave it out of the plan")
        for S in needs[name]:
            if not S.backward and S in needs[owner]:
                collected[name][S] = collected[owner][S]
    return collected


def _siblings(name: str, modules: Mapping[str, nn.Module], ran: Iterable[str]) -> list[str]:
    """The other experts of a layer that ran; none where the module is no expert's."""
    if expert(modules[name]) is None:
        return []
    return [other for other in ran if other.rpartition(".")[0] == name.rpartition(".")[0]]


def _average(of: list[Statistic]) -> Statistic:
    """What one token showed, an average one of these."""
    whole = functools.reduce(lambda a, b: a.merge(b), of)
    assert whole.total is not None
    whole.total, whole.tokens = whole.total / whole.tokens, 1
    return whole


def _entrance(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_input_embeddings", None)
    entrance = get() if callable(get) else next((m for m in model.modules() if not list(m.children())), None)
    if not isinstance(entrance, nn.Module):
        raise Invalid("collect found no input module to start gradients from")
    return entrance
