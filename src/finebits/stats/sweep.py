"""Block by block: what flows into the blocks of a model, so that one block at a time can be in memory, measured, changed and run.

`collect` runs a whole model and sees what the unquantized weights make of the text. A sweep holds the states between two blocks, so that
the statistics of a block can be those of the blocks before it as they are by then, quantized ones among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finebits.stats.base import Statistic
from finebits.stats.collect import Needs, collect


class Calls(NamedTuple):
    """What the first block is given, (b, t, h) a batch, and what else every block is called with: [batch] -> (positional, by name)."""

    states: list[Tensor]
    rest: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]

    def run(self, block: nn.Module, name: str, batch: int, states: Tensor) -> Tensor:
        """The states after a block."""
        positional, named = self.rest[name][batch]
        return block(states, *positional, **named)


def blocks_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The blocks that hold the modules `names`: the members, in order, of the outermost nn.ModuleList that holds them all.

    Raises ValueError if there is no such list.
    """
    wanted = list(names)
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and wanted and all(n.startswith(f"{prefix}.") for n in wanted):
            return [f"{prefix}.{i}" for i in range(len(module))]
    raise ValueError("a sweep goes block by block, and no nn.ModuleList of this model holds every module of the plan: plan with collect")


def calls(model: nn.Module, blocks: Sequence[str], batches: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> Calls:
    """One pass in which every block hands on what it is given: nothing inside a block is computed, and its weights may still be missing.

    `run(model, batch)` calls the part of the model that holds the blocks. Raises ValueError if a block is not called once a batch, with
    its states first.
    """
    found = Calls([], {name: [] for name in blocks})
    modules = {name: model.get_submodule(name) for name in blocks}

    def instead(name: str) -> Callable:
        def forward(*positional: Any, **named: Any) -> Tensor:
            if not positional or not isinstance(positional[0], Tensor):
                raise ValueError(f"a sweep hands states from block to block, and {name} is not called with a tensor first")
            if name == blocks[0]:
                found.states.append(positional[0].detach())
            found.rest[name].append((positional[1:], named))
            return positional[0]

        return forward

    for name, module in modules.items():
        if "forward" in vars(module):
            raise ValueError(f"the forward of {name} was already replaced by a hook (accelerate?): sweep first, dispatch afterwards")
        module.forward = instead(name)  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
    finally:
        for module in modules.values():
            del module.forward
    if any(len(c) != len(batches) for c in found.rest.values()):
        raise ValueError("a sweep needs every block to run once a batch, in order")
    return found


def measure(
    calls: Calls, block: nn.Module, name: str, states: Sequence[Tensor], needs: Needs, keep: Callable[[int], Tensor | None]
) -> dict[str, dict[type[Statistic], Statistic]]:
    """Statistics of the modules in one block, by full name, given the states that enter it.

    Raises ValueError for a statistic that asks for gradients: those go through the whole model, so that `collect` gathers them.
    """
    inside = {n.removeprefix(f"{name}."): wanted for n, wanted in needs.items() if wanted and n.startswith(f"{name}.")}
    back = sorted({S.__name__ for wanted in inside.values() for S in wanted if S.backward})
    if back:
        raise ValueError(f"{', '.join(back)} needs gradients, which go through the whole model: calibrate with collect, not with a sweep")
    if not inside:
        return {}
    found = collect(block, range(len(states)), lambda m, i: calls.run(m, name, i, states[i]), inside, keep)
    return {f"{name}.{n}": s for n, s in found.items()}
