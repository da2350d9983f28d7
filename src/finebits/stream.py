"""A model of which one block at a time is in memory: its parameters are read when it is reached, and dropped when all batches are through.

`lazily` makes a model whose blocks are on the meta device run at all: whoever calls a block finds its parameters there. That alone reads the
model once a batch. `Flow` turns the loops around: all batches go through a block before the next is read, and what waits between two blocks
are states, in host memory or in a file.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finebits.errors import Invalid
from finebits.files import writing

STATES_IN_MEMORY = 2**24  # bytes of waiting states that are in host memory; what comes after them is in a file
Read = Callable[[str], Tensor]


class Spill(MutableMapping[Hashable, Tensor]):
    """Tensors by key, on the host: `in_memory` bytes of them in memory, the others in a file that has no name and goes with this object.

    A tensor in memory is handed out as it is; one of the file is read anew each time.

    >>> spill = Spill(in_memory=8)
    >>> spill["a"], spill["b"] = torch.ones(2), torch.zeros(2)  # the first eight bytes stay in memory
    >>> list(spill.memory), spill["b"]
    (['a'], tensor([0., 0.]))
    """

    def __init__(self, in_memory: int | None = None) -> None:
        self.left = STATES_IN_MEMORY if in_memory is None else in_memory
        self.memory: dict[Hashable, Tensor] = {}
        self.places: dict[Hashable, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        self.file: IO[bytes] | None = None
        self.end = 0

    def __setitem__(self, key: Hashable, t: Tensor) -> None:
        t = t.detach().cpu().contiguous()
        before = self.memory.pop(key, None)
        self.left += 0 if before is None else before.nbytes
        if key not in self.places and t.nbytes <= self.left:
            self.memory[key], self.left = t, self.left - t.nbytes
            return
        if self.file is None:
            self.file = tempfile.TemporaryFile(prefix="finebits-")  # noqa: SIM115  # it lives as long as this object
        at, room, *_ = self.places.get(key, (self.end, 0))
        if room < t.nbytes:
            at, room, self.end = self.end, t.nbytes, self.end + t.nbytes
        self.places[key] = at, room, tuple(t.shape), t.dtype
        with writing(Path(tempfile.gettempdir())):
            self.file.seek(at)
            self.file.write(t.reshape(-1).view(torch.uint8).numpy().data)
            self.file.flush()

    def __getitem__(self, key: Hashable) -> Tensor:
        if key in self.memory:
            return self.memory[key]
        at, _, shape, dtype = self.places[key]
        assert self.file is not None
        out = torch.empty(shape, dtype=dtype)
        self.file.seek(at)
        cast(Any, self.file).readinto(out.reshape(-1).view(torch.uint8).numpy().data)
        return out

    def __delitem__(self, key: Hashable) -> None:
        if key in self.memory:
            self.left += self.memory.pop(key).nbytes
        else:
            del self.places[key]

    def __iter__(self) -> Iterator[Hashable]:
        yield from self.memory
        yield from self.places

    def __len__(self) -> int:
        return len(self.memory) + len(self.places)

    def __del__(self) -> None:
        if self.file is not None:
            self.file.close()


@contextlib.contextmanager
def loaded(block: nn.Module, name: str, read: Read) -> Iterator[None]:
    """Inside, the parameters of `block` that are on the meta device are what `read(full name)` gives; outside they are on it again.

    >>> block = torch.nn.Linear(2, 1, bias=False, device="meta")
    >>> with loaded(block, "layers.0", lambda name: print(name) or torch.ones(1, 2)):
    ...     block(torch.ones(1, 2))
    layers.0.weight
    tensor([[2.]])
    >>> block.weight.device.type
    'meta'
    """
    absent = [(n, p) for n, p in block.named_parameters(remove_duplicate=False) if p.device.type == "meta"]
    try:
        for n, _ in absent:
            _put(block, n, nn.Parameter(read(f"{name}.{n}"), requires_grad=False))
        yield
    finally:
        for n, p in absent:
            _put(block, n, p)


@contextlib.contextmanager
def in_memory(model: nn.Module, names: Sequence[str], read: Read) -> Iterator[Any]:
    """The model, with the blocks of these names all `loaded`: inside, nothing is read anew."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(loaded(model.get_submodule(name), name, read))
        yield model


def absent(like: Tensor, read: Callable[[], Tensor]) -> nn.Parameter:
    """A parameter of this shape and dtype that takes no memory: zeros, until `present` reads it.

    >>> W = absent(torch.ones(1000, 1000), lambda: torch.ones(1000, 1000))
    >>> W.shape, W.untyped_storage().nbytes()
    (torch.Size([1000, 1000]), 4)
    """
    p = nn.Parameter(torch.zeros((), dtype=like.dtype).expand(like.shape), requires_grad=False)
    p.read = read  # pyright: ignore[reportAttributeAccessIssue]
    return p


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of a module that are `absent` are there; what is below it is not looked at.

    >>> linear = torch.nn.Linear(2, 1, bias=False)
    >>> linear.weight = absent(linear.weight, lambda: torch.ones(1, 2))
    >>> with present(linear):
    ...     linear.weight.tolist()
    [[1.0, 1.0]]
    """
    there = {k: p for k, p in module._parameters.items() if p is not None and hasattr(p, "read")}
    try:
        for k, p in there.items():
            module._parameters[k] = nn.Parameter(cast(Any, p).read(), requires_grad=False)
        yield
    finally:
        module._parameters.update(there)


def _put(block: nn.Module, name: str, p: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    block.get_submodule(owner)._parameters[leaf] = p


class _Lazy:
    """The forward of a block that reads its parameters when it is called."""

    def __init__(self, block: nn.Module, name: str, read: Read) -> None:
        self.block, self.name, self.read = block, name, read

    def __call__(self, *positional: Any, **named: Any) -> Any:
        with loaded(self.block, self.name, self.read):
            return type(self.block).forward(self.block, *positional, **named)


def lazily(model: nn.Module, blocks: Iterable[str], read: Read) -> nn.Module:
    """From here on the blocks of `model` read what they lack whenever they are called, and drop it again. Not for training.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False, device="meta"))
    >>> lazily(model, ["0"], lambda name: torch.ones(1, 2))(torch.ones(1, 2))
    tensor([[2.]])
    """
    for name in blocks:
        block = model.get_submodule(name)
        block.forward = _Lazy(block, name, read)
    return model


class _Reached(Exception):
    """The block that was wanted has been called."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class Flow:
    """The way of every batch through a model, which can be walked from block to block.

    `run(model, batch)` calls the part of the model that holds the blocks, and gives what `leave` is to give. What a block is called with
    beside its states (masks, positions) is made again by the model itself each time and held by nobody; so a block can be entered only
    when those before it were walked through. Raises ValueError if a block is not called once a batch, with its states first.

    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU())
    >>> flow = Flow(model, ["0", "1"], [torch.tensor([-1.0, 2.0])], lambda model, x: model(x))
    >>> states = flow.entered()
    >>> for block in flow.names:
    ...     flow.walk(states, block)
    >>> states[0], flow.leave(0, states[0])
    (tensor([0., 2.]), tensor([0., 2.]))
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> None:
        self.model, self.names, self.batches, self.run = model, list(blocks), batches, run
        self.blocks = [model.get_submodule(name) for name in blocks]
        self.device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        self.gives: dict[int, Callable[[Tensor], Any]] = {}  # block -> what its class returns around its states
        for name, block in zip(self.names, self.blocks, strict=True):
            if not isinstance(vars(block).get("forward", None), _Lazy | None):
                raise Invalid(f"the forward of {name} was already replaced by a hook (accelerate?): sweep first, dispatch afterwards")

    def __len__(self) -> int:
        return len(self.batches)

    def enter(self, batch: int) -> Tensor:
        """The states that the first block is given.

        >>> flow = Flow(torch.nn.Sequential(torch.nn.ReLU()), ["0"], [torch.tensor([-1.0])], lambda model, x: model(2 * x))
        >>> flow.enter(0)
        tensor([-2.])
        """
        return self._until(0, batch, lambda states, *positional, **named: states)

    def through(self, name: str, batch: int, states: Tensor) -> Tensor:
        """The states after a block, given those before it.

        >>> flow = Flow(torch.nn.Sequential(torch.nn.ReLU()), ["0"], [torch.tensor([-1.0])], lambda model, x: model(x))
        >>> flow.through("0", 0, torch.tensor([-3.0, 4.0]))
        tensor([0., 4.])
        """
        at = self.names.index(name)
        own = vars(self.blocks[at]).get("forward") or self.blocks[at].forward

        def forward(_: Tensor, *positional: Any, **named: Any) -> Tensor:
            out = own(states.to(self.device), *positional, **named)
            several = isinstance(out, tuple | list)
            first, *rest = out if several else (out,)
            rest, kind = [None if isinstance(r, Tensor) else r for r in rest], list if isinstance(out, list) else tuple
            self.gives[at] = (lambda x: kind((x, *rest))) if several else (lambda x: x)
            return first

        return self._until(at, batch, forward)

    def leave(self, batch: int, states: Tensor) -> Any:
        """What `run` makes of a batch, given the states after the last block."""
        last = len(self.blocks) - 1
        states, called = states.to(self.device), [0] * len(self.blocks)

        def stand_in(at: int) -> Callable:
            def forward(*positional: Any, **named: Any) -> Any:
                called[at] += 1
                return self.gives[at](states if at == last else _states(self.names[at], positional, named)[0])

            return forward

        with self._standing([stand_in(i) for i in range(last + 1)]):
            out = self.run(self.model, self.batches[batch])
        if called != [1] * len(called):
            raise Invalid("a sweep needs every block to run once a batch, in order")
        return out

    def whole(self, batch: int) -> Any:
        """What `run` makes of a batch; every block is computed again in the backward pass.

        >>> flow = Flow(torch.nn.Sequential(torch.nn.ReLU()), ["0"], [torch.tensor([-1.0, 2.0])], lambda model, x: 3 * model(x))
        >>> flow.whole(0)
        tensor([0., 6.])
        """
        x = self.enter(batch)
        for name in self.names:
            x = cast(Tensor, checkpoint(lambda x, name=name: self.through(name, batch, x), x, use_reentrant=False))
        return self.leave(batch, x)

    def finish(self, states: Spill) -> None:
        """Make of the states of all batches after the last block what `run` makes of them, in place."""
        with torch.no_grad():
            for i in range(len(self)):
                states[i] = self.leave(i, states[i])

    def walk(self, states: Spill, name: str) -> None:
        """Take the states of all batches through a block, in place."""
        with torch.no_grad():
            for i in range(len(self)):
                states[i] = self.through(name, i, states[i])

    def entered(self, in_memory: int | None = None) -> Spill:
        """The states of all batches as the first block is given them, `in_memory` bytes of them in memory."""
        states = Spill(in_memory)
        with torch.no_grad():
            for i in range(len(self)):
                states[i] = self.enter(i)
        return states

    def _until(self, at: int, batch: int, forward: Callable[..., Tensor]) -> Tensor:
        """What `forward`, in the place of block `at`, makes of what that block is called with. Nothing after it runs."""

        def before(i: int) -> Callable:
            return lambda *positional, **named: self.gives[i](_states(self.names[i], positional, named)[0])

        def reached(*positional: Any, **named: Any) -> Any:
            states, rest, others = _states(self.names[at], positional, named)
            raise _Reached(forward(states, *rest, **others))

        with self._standing([*(before(i) for i in range(at)), reached]):
            try:
                self.run(self.model, self.batches[batch])
            except _Reached as stop:
                return stop.states
        raise Invalid(f"a sweep needs every block to run once a batch, in order, and {self.names[at]} did not run")

    @contextlib.contextmanager
    def _standing(self, forwards: Sequence[Callable]) -> Iterator[None]:
        """Inside, the first blocks have these forwards."""
        before = [vars(block).get("forward") for block in self.blocks]
        try:
            for block, forward in zip(self.blocks, forwards, strict=False):
                block.forward = forward
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                if forward is not None:
                    block.forward = forward
                elif "forward" in vars(block):
                    del block.forward


def _states(name: str, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """(states, what else) of what a block was called with."""
    if positional and isinstance(positional[0], Tensor):
        return positional[0], positional[1:], named
    if not positional and isinstance(named.get("hidden_states"), Tensor):
        return named["hidden_states"], (), {k: v for k, v in named.items() if k != "hidden_states"}
    raise Invalid(f"a sweep hands states from block to block, and {name} is not called with a tensor first")
