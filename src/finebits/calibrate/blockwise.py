"""Statistics block by block, so that one block and its own statistics are in memory at a time.

`collect` runs a whole model. Here the states of all batches wait between two blocks, so that the statistics of a block can be those of the
blocks before it as they are by then, quantized ones among them; and gradients come back through the blocks one at a time, each computed again
from the states that entered it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finebits.calibrate.whole_model import Needs, collect
from finebits.errors import Invalid
from finebits.stats.base import Statistic, Stats
from finebits.stream import Flow, Read, Spill, loaded

StatsByModule = dict[str, dict[type[Statistic], Statistic]]
Keep = Callable[[int], Tensor | None]


def blocks_of(model: nn.Module, names: Iterable[str] = ()) -> list[str]:
    """The blocks of a model, in order: the members of that outermost nn.ModuleList which holds most parameters.

    Raises ValueError if there is no list, or if none of the modules `names` is in it.

    >>> model = torch.nn.Sequential()
    >>> model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    >>> blocks_of(model)
    ['layers.0', 'layers.1']
    """
    wanted, lists = list(names), dict[str, nn.ModuleList]()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(prefix.startswith(f"{outer}.") for outer in lists):
            lists[prefix] = module
    prefix = max(lists, key=lambda k: sum(p.numel() for p in lists[k].parameters()), default=None)
    if prefix is None or wanted and not any(n.startswith(f"{prefix}.") for n in wanted):
        raise Invalid("a sweep goes block by block, and no nn.ModuleList of this model holds the modules of the plan: plan without one")
    return [f"{prefix}.{i}" for i in range(len(lists[prefix]))]


def measure(flow: Flow, name: str, states: Mapping[Any, Tensor], needs: Needs, keep: Keep) -> StatsByModule:
    """Statistics of the modules in one block, by full name, given the states that enter it.

    Raises ValueError for a statistic that asks for gradients: those come back through the blocks after it (`gradients`).
    """
    inside = _inside(name, needs)
    back = sorted({S.__name__ for wanted in inside.values() for S in wanted if S.backward})
    if back:
        raise Invalid(f"{', '.join(back)} needs gradients, which come from the blocks after it: give stats=collect(...)")
    if not inside:
        return {}
    block = flow.model.get_submodule(name)
    collected = collect(block, range(len(flow)), lambda m, i: flow.through(name, i, states[i]), inside, keep)
    return {f"{name}.{n}": s for n, s in collected.items()}


def forwards(flow: Flow, needs: Needs, keep: Keep, read: Read) -> Iterator[StatsByModule]:
    """Statistics of the unquantized model, block after block; parameters that are not there are read."""
    states = flow.entered()
    last = max((i for i, name in enumerate(flow.names) if _inside(name, needs)), default=-1)
    for name in flow.names[: last + 1]:
        with loaded(flow.model.get_submodule(name), name, read):
            yield measure(flow, name, states, needs, keep)
            flow.walk(states, name)


def gradients(
    flow: Flow,
    needs: Needs,
    keep: Keep,
    read: Read,
    progress: Callable[[int], None] = lambda done: None,
    left: Callable[[int, Tensor], None] = lambda batch, states: None,
    entered_by: Callable[[int, Tensor], None] = lambda batch, gradient: None,
) -> Iterator[StatsByModule]:
    """Statistics of gradients (and of inputs) of the unquantized model, from the last block to the first.

    `flow.run` gives the summed loss of a batch. The states that entered every block wait (in a file where they are many), and each block is
    computed again from them when the gradients of what it gave are there. `progress` is told how many of the 2 L passes of blocks are done,
    `left` the states of every batch behind the last block, `entered_by` in the end the gradient of those before the first.
    """
    entered, states = Spill(), flow.entered()
    for k, name in enumerate(flow.names):
        for i in range(len(flow)):
            entered[name, i] = states[i]
        with loaded(flow.model.get_submodule(name), name, read):
            flow.walk(states, name)
        progress(k + 1)
    for i in range(len(flow)):
        left(i, states[i])
        with torch.enable_grad():
            x = states[i].to(flow.device).requires_grad_()
            states[i] = torch.autograd.grad(flow.leave(i, x), x)[0]
    for k, name in enumerate(reversed(flow.names)):
        block, inside = flow.model.get_submodule(name), _inside(name, needs)

        def pulled(_: nn.Module, i: int, name: str = name) -> Tensor:
            """A number whose gradient is that of the batch's loss; the gradient of the states that entered is kept when it is there."""
            x = entered[name, i].to(flow.device).requires_grad_()
            x.register_hook(lambda g: states.__setitem__(i, g))
            return (flow.through(name, i, x) * states[i].to(flow.device)).sum()

        with loaded(block, name, read):
            if any(S.backward for wanted in inside.values() for S in wanted):
                yield {f"{name}.{n}": s for n, s in collect(block, range(len(flow)), pulled, inside, keep).items()}
            else:
                yield measure(flow, name, {i: entered[name, i] for i in range(len(flow))}, needs, keep)
                with torch.enable_grad():
                    for i in range(len(flow)):
                        pulled(block, i).backward()
        for i in range(len(flow)):
            del entered[name, i]
        progress(len(flow.names) + k + 1)
    for i in range(len(flow)):
        entered_by(i, states[i])


def _inside(name: str, needs: Needs) -> dict[str, frozenset[type[Statistic]]]:
    return {n.removeprefix(f"{name}."): wanted for n, wanted in needs.items() if wanted and n.startswith(f"{name}.")}


class Shelf(Mapping[str, Stats]):
    """Statistics by module that wait in a file until their module is at hand.

    >>> gram, shelf = fb.Gram(), Shelf()
    >>> gram.add(torch.eye(2))
    >>> shelf.add({"q": {fb.Gram: gram}})
    >>> list(shelf), shelf["q"][fb.Gram].value()  # read back from the file
    (['q'], tensor([[0.5000, 0.0000], [0.0000, 0.5000]]))
    """

    def __init__(self) -> None:
        self.totals = Spill(0)
        self.tokens: dict[str, dict[type[Statistic], int]] = {}

    def add(self, by_module: StatsByModule) -> None:
        """Put away the statistics of some modules."""
        for name, stats in by_module.items():
            self.tokens[name] = {S: s.tokens for S, s in stats.items()}
            for S, s in stats.items():
                if s.total is not None:
                    self.totals[name, S] = s.total

    def __getitem__(self, name: str) -> Stats:
        stats: dict[type[Statistic], Statistic] = {}
        for S, tokens in self.tokens[name].items():
            stats[S] = S()
            stats[S].tokens = tokens
            if (name, S) in self.totals:
                stats[S].total = self.totals[name, S]
        return stats

    def __iter__(self) -> Iterator[str]:
        return iter(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)
