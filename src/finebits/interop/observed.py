"""What the blocks of a model hold in a step, observed: its own modules run on tensors without storage, and every storage is counted.

No architecture is known by name. The model, wholly on the meta device, is run forward; of blocks that are alike the first is run once more,
forward and backward, with adapters over its planned matrices; all others hand on numbers that nobody computes. What is allocated meanwhile
`tally` counts.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from finebits.adapters.base import Base, Params, identity
from finebits.anatomy import found
from finebits.calibrate.blockwise import blocks_of
from finebits.carrier import Carrier, carriers
from finebits.errors import Invalid, out_of_memory
from finebits.interop.tally import Attending, New, Tally
from finebits.linears import expert
from finebits.plan.seen import Curve, Observed
from finebits.tasks import base as tasks
from finebits.tasks._head import instead

ROWS = (1, 2)  # of the batches that are looked at
LEAST = (8, 32)  # tokens a row of the shortest ones
LOOP = 1.5  # times the operations: a block that goes through its tokens one by one, where more of them are more of the same


class Block(NamedTuple):
    """Bytes of one block: what it keeps for its backward pass, what comes and goes in that pass beside it, all of it where the block is computed
    again from its input, and what that leaves behind; what passes forward where nothing is kept; the operations that it ran."""

    kept: int
    back: int
    again: int
    left: int
    forward: int
    ran: int


class Outside(NamedTuple):
    """Bytes outside the blocks: what they all share (masks, tables of positions), what is kept of the way from the last block to the head, and
    the most that is there on this way and back."""

    shared: int
    kept: int
    back: int


def observed(
    model: Any,
    planned: Mapping[str, Sequence[int]],
    adapter: Any,
    dtype: torch.dtype,
    longest: int,
    dropout: float = 0.0,
    own: Mapping[str, Any] | None = None,
    laid: Mapping[str, Any] = types.MappingProxyType({}),
) -> tuple[Observed, frozenset[str]]:
    """What the blocks of `model`, on the meta device, hold in batches of rows up to `longest` tokens while the planned matrices, or what else
    `adapter` lies over, are trained under it, and which of these matrices the model calls. Blocks compute in `dtype`. `own` are the
    adapters of all planned matrices, None for one without, where they are not as `placed` has them; `laid` those over tables of embeddings.

    Raises ValueError in one sentence if the model does not run without values.
    """
    own = placed(model, planned, adapter) if own is None else own
    key = (type(model), model.config.to_json_string(), tuple(planned.items()), adapter, tuple(own.items()), dtype, longest, dropout)
    key += tuple(laid.items())
    key += (model.config.get_text_config()._attn_implementation, tuple(n for n, p in model.named_parameters() if p.requires_grad))
    if key not in _seen:
        _seen[key] = _observed(model, planned, adapter, own, dtype, longest, dropout, laid)
    return _seen[key]


_seen: dict[Any, tuple[Observed, frozenset[str]]] = {}


def _observed(
    model: Any,
    planned: Mapping[str, Sequence[int]],
    adapter: Any,
    own: Mapping[str, Any],
    dtype: torch.dtype,
    longest: int,
    dropout: float,
    laid: Mapping[str, Any],
) -> tuple[Observed, frozenset[str]]:
    blocks, called, width = blocks_of(model), dict[str, int](), list[int]()
    alike, outputs = dict[str, str](), dict[str, Any]()
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(_forget)
    lengths = sorted({min(n, longest) for n in LEAST} | {max(longest // 4, min(longest, LEAST[0])), longest})
    runs: dict[tuple[int, int], tuple[dict[str, Block], Outside]] = {}
    was = model.training
    model.train()
    try:
        shapes = {n: s for n, s in planned.items() if len(s) == 2}
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _adapted(model, shapes, adapter, own, dtype, dropout, called, laid) as tensors,
        ):
            for b in ROWS:
                loops = dict[str, tuple[int, Block]]()
                for t in lengths:
                    kinds, _ = runs[b, t] = _run(model, blocks, tensors, alike, outputs, width, loops, b, t)
                    for kind, block in kinds.items():
                        if block.ran > LOOP * runs[b, lengths[0]][0][kind].ran:
                            loops.setdefault(kind, (t, block))
    except Exception as e:  # a forward can want values in as many ways as there are forwards
        if out_of_memory(e):
            raise
        reason = (str(e).splitlines() or ["no reason given"])[0].rstrip(".")
        raise Invalid(f"{type(model).__name__} does not run without its values, so what it holds is not known ({reason})") from e
    finally:
        model.train(was)
    for name in list(called):
        kind = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if kind is not None:
            called |= {other + name.removeprefix(kind): called[name] for other in blocks if alike[other] == alike[kind]}

    def share(name: str) -> float:
        """Of all tokens, those that a matrix meets: an expert's are its own."""
        return 1.0 if expert(model.get_submodule(name)) is None else called[name] / (ROWS[-1] * lengths[-1])

    def curve(value: Callable[[dict[str, Block], Outside], float]) -> Curve:
        return Curve(tuple(lengths), *(tuple(value(*runs[b, t]) / (b * t) for t in lengths) for b in ROWS))

    return (
        Observed(
            kept=curve(lambda kinds, _: sum(kinds[alike[name]].kept for name in blocks)),
            most=curve(lambda kinds, _: max(k.kept for k in kinds.values())),
            back=curve(lambda kinds, _: max(k.back for k in kinds.values())),
            again=curve(lambda kinds, _: max(k.again for k in kinds.values())),
            left=curve(lambda kinds, _: sum(kinds[alike[name]].left for name in blocks)),
            forward=curve(lambda kinds, _: max(k.forward for k in kinds.values())),
            shared=curve(lambda _, outside: outside.shared),
            ends=curve(lambda _, outside: outside.kept),
            turn=curve(lambda _, outside: outside.back),
            layers=len(blocks),
            hidden=width[0],
            adapted=round(sum(share(n) for n, s in planned.items() if len(s) == 2 and n in called and own[n] is not None)),
            rank=max((a.rank for a in own.values() if a is not None), default=0),
            width=dtype.itemsize,
            virtual=width[1],
        ),
        frozenset(called),
    )


@contextlib.contextmanager
def _adapted(
    model: nn.Module,
    planned: Mapping[str, Sequence[int]],
    adapter: Any,
    own: Mapping[str, Any],
    dtype: torch.dtype,
    dropout: float,
    called: dict[str, int],
    laid: Mapping[str, Any],
) -> Iterator[list[Tensor]]:
    """The planned linears, and what is no matrix, under adapters, whose tensors are handed out; linears that are called are put down."""
    drop, every = functools.partial(F.dropout, p=dropout) if dropout else identity, list[Tensor]()
    with contextlib.ExitStack() as stack:
        for name, (m, n) in planned.items():
            linear: Any = model.get_submodule(name)
            tensors = {} if own[name] is None else _tensors(own[name], m, n, dtype)
            every += tensors.values()

            def forward(x: Tensor, linear: Any = linear, name: str = name, tensors: Params = tensors) -> Tensor:
                called[name] = max(called.get(name, 0), x.numel() // x.shape[-1])
                base = Base(linear.weight, linear.bias, drop)
                return base(x) if own[name] is None else own[name].forward(tensors, x, base)

            stack.enter_context(instead(linear, forward))
        for name, kind in {**dict.fromkeys(over(model, adapter), adapter), **laid}.items():
            module = model.get_submodule(name)
            table = isinstance(module, nn.Embedding)
            host = Carrier.over(module, "table" if table else kind.over)
            stack.callback(host.off)
            host.hold("default", kind, _tensors(kind, *host.size, torch.float32 if table else dtype))
            host.drops = dropout
            for t in host.p.parameters():
                if t.requires_grad:
                    t.register_post_accumulate_grad_hook(_forget)
                every.append(t)
        yield every


def over(model: nn.Module, adapter: Any) -> dict[str, tuple[int, int]]:
    """The modules that an adapter lies over and that are no matrices, with what it is sized by; none where it lies over matrices."""
    return {} if adapter.over == "matrix" else found(model, adapter.over)


def placed(model: nn.Module, names: Iterable[str], adapter: Any) -> dict[str, Any]:
    """The adapter of each of these matrices. One that lies over something else leaves those inside without any; outside they have what it has
    beside it (`beside`), which is none where it does not say."""
    inside = tuple(f"{name}." for name in over(model, adapter))
    if not inside:
        return {name: adapter.at(name) for name in names}
    return {name: None if name.startswith(inside) else getattr(adapter, "beside", None) for name in names}


def _tensors(adapter: Any, m: int, n: int, dtype: torch.dtype) -> Params:
    """An adapter's tensors over an (m, n) weight on the meta device; a gradient is gone as soon as it is there, for it is counted elsewhere."""
    params = Params()
    for k, shape in adapter.shapes(m, n).items():
        held = torch.float32 if k in adapter.kept else dtype
        params[k] = torch.empty(shape, dtype=held, device="meta").requires_grad_(k not in adapter.frozen)
        if k not in adapter.frozen:
            params[k].register_post_accumulate_grad_hook(_forget)
    return params


def _forget(p: Tensor) -> None:
    p.grad = None


def _run(
    model: Any,
    blocks: Sequence[str],
    tensors: Sequence[Tensor],
    alike: dict[str, str],
    outputs: dict[str, Any],
    width: list[int],
    loops: Mapping[str, tuple[int, Block]],
    b: int,
    t: int,
) -> tuple[dict[str, Block], Outside]:
    """Blocks by kind, and what lies outside of them, in a batch of b rows of t tokens. What kind a block is of is written into `alike`, what
    blocks of a kind give into `outputs`, and how wide the states are into `width`."""
    tally, kinds, shared, ahead = Tally(), dict[str, Block](), list[int](), list[int]()
    task, virtual = tasks.of(model), any(host.place == "model" for _, host in carriers(model))
    batch = task.blank(b, t)
    leaf = torch.empty(1, device="meta", requires_grad=True)
    tally.known(leaf, *batch.values(), *tensors, *model.parameters(), *model.buffers())

    def stand_in(name: str, *positional: Any, **named: Any) -> Any:
        block, x = model.get_submodule(name), positional[0] if positional else named["hidden_states"]
        width[:] = [x.shape[-1], x.shape[1] - t if virtual else 0]
        shared.append(tally.now - x.untyped_storage().nbytes())
        kind = alike[name] = _kind(block, positional[1:], named)
        if kind not in kinds and kind in loops:
            short, measured = loops[kind]
            kinds[kind] = Block(*(math.ceil(v * t / short) for v in measured))
        elif kind not in kinds:

            def call(x: Tensor) -> Any:
                return block(x, *positional[1:], **named) if positional else block(**named | {"hidden_states": x})

            before = tally.most
            with instead(block, functools.partial(type(block).forward, block)):
                kinds[kind], outputs[kind] = _block(tally, call, x, leaf)
            tally.most = before
        out = New.apply(leaf, x.detach())
        gave = _replaced(outputs[kind], out)
        tally.known(*(v for v in tree_leaves(gave) if isinstance(v, Tensor) and v is not out))  # what it kept of these was seen
        tally.most = tally.now
        ahead[:] = [tally.now - out.untyped_storage().nbytes()]
        return gave

    with contextlib.ExitStack() as stack:
        for name in blocks:
            stack.enter_context(instead(model.get_submodule(name), functools.partial(stand_in, name)))
        stack.enter_context(tally)
        stack.enter_context(Attending())
        h = task.states(model, batch)
        kept = tally.now
        most = tally.most - ahead[0]
        places = task.places(h)
        edge, g = torch.autograd.graph.get_gradient_edge(places), torch.empty_like(places)
        del h, places
        tally.most = tally.now
        torch.autograd.backward([edge], [g])
    return kinds, Outside(shared[0], kept, max(most, tally.most))


def _block(tally: Tally, call: Callable[[Tensor], Any], like: Tensor, leaf: Tensor) -> tuple[Block, Any]:
    """What one block holds, and what it gives. It runs without gradients last, so that one that keeps something for itself lets its graph go."""
    ran, start = tally.ran, tally.now
    tally.most = start
    x = New.apply(leaf, like.detach())
    states = _first(call(x))
    if states.shape != like.shape:
        raise Invalid(f"a block makes states {tuple(states.shape)} of states {tuple(like.shape)}, and blocks are to leave them their shape")
    edge = torch.autograd.graph.get_gradient_edge(states)
    ahead = tally.most - start
    del x, states
    kept, tally.most = tally.now - start, tally.now
    torch.autograd.backward([edge], [torch.empty_like(like)])
    back = max(tally.most - start, ahead) - kept
    before, x = tally.now, New.apply(leaf, like.detach())
    edge = torch.autograd.graph.get_gradient_edge(_first(checkpoint(call, x, use_reentrant=False, preserve_rng_state=False)))
    start = tally.most = tally.now
    torch.autograd.backward([edge], [torch.empty_like(like)])
    again = tally.most - start
    del x, edge
    left = tally.now - before
    start = tally.most = tally.now
    with torch.no_grad():
        x = torch.empty_like(like)
        out = call(x)
    forward = tally.most - start - x.untyped_storage().nbytes()
    gave = tree_map(lambda v: functools.partial(torch.empty, v.shape, dtype=v.dtype, device="meta") if isinstance(v, Tensor) else v, out)
    return Block(kept, back, again, max(left, 0), forward, tally.ran - ran), gave


def _first(out: Any) -> Tensor:
    """The states that a block gave."""
    return next(v for v in tree_leaves(out) if isinstance(v, Tensor))


def _replaced(gave: Any, states: Tensor) -> Any:
    """What a block gives: these states, and the rest made anew."""
    if isinstance(gave, functools.partial):
        return states
    parts, first = [], True
    for v in gave:
        parts.append(states if first and isinstance(v, functools.partial) else tree_map(lambda s: s() if callable(s) else s, v))
        first = first and not isinstance(v, functools.partial)
    return type(gave)(parts)


def _kind(block: nn.Module, *arguments: Any) -> str:
    """Blocks of the same kind are alike: of one class, with the same shapes of parameters and the same settings, the same of them trained or
    adapted, and given the same things."""
    kinds = [(v.ndim, v.dtype) if isinstance(v, Tensor) else v if isinstance(v, bool) else type(v) for v in tree_leaves(arguments)]
    settings = defaultdict(list)
    for name, module in block.named_modules():
        for k, v in vars(module).items():
            if isinstance(v, bool | int | str | tuple) and "idx" not in k and not k.startswith("_"):
                settings[name].append((k, v))
    sizes = [(k, tuple(p.shape), p.requires_grad) for k, p in block.named_parameters()]
    adapted = [name for name, module in block.named_modules() if "forward" in vars(module)]
    return repr((type(block).__qualname__, sizes, kinds, adapted, sorted(settings.items())))
