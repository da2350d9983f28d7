"""What the matrices of a model's blocks do, seen as its modules run on tensors without storage: no architecture is known by name.

What flows into attention as queries, keys and values, and out of it, is followed back through autograd's graph to the matrix that it
comes from, and so is the input of every matrix. One whose input is made of what other matrices of its block gave and of nothing else, and which
is no such other itself, leaves a feed-forward sublayer, or one that mixes tokens without attention.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from finebits.adapters.base import Role
from finebits.calibrate.blockwise import blocks_of
from finebits.errors import Invalid, out_of_memory
from finebits.interop.observed import placed
from finebits.interop.tally import New, Tally
from finebits.tasks import base as tasks
from finebits.tasks._head import instead

ATTENDED, WEIGHTS, STATES = "attention", "weights of attention", "states"  # what flows, and comes out of no matrix
TOKENS = 8
PRODUCTS = {
    torch.matmul: 0,
    torch.bmm: 0,
    Tensor.matmul: 0,
    Tensor.bmm: 0,
    Tensor.__matmul__: 0,
    Tensor.baddbmm: 1,
    torch.baddbmm: 1,
}  # from which argument on
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class Tracing(TorchFunctionMode):
    """Follows what matrices give to where it is used: their names, by the nodes of autograd's graph."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = torch.empty(1, device="meta", requires_grad=True)
        self.nodes: dict[Any, str] = {}
        self.products: dict[Any, tuple[Tensor, Tensor]] = {}
        self.into: dict[str, set[str]] = defaultdict(set)  # matrix -> what its input is made of
        self.attends: dict[str, set[str]] = defaultdict(set)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            q, k, v = (named[name] for name in ("query", "key", "value"))
            self.attend(queries=q, keys=k, values=v)
            return self.mark(q.new_empty(*q.shape[:-1], v.shape[-1]), ATTENDED)
        out = func(*args, **kwargs or {})
        if func in PRODUCTS:  # the two products of an attention that is written out
            a, b = [*args, *(kwargs or {}).values()][PRODUCTS[func] :][:2]
            if WEIGHTS in self.sources(a):
                self.attend(values=b)
                return self.mark(out, ATTENDED)
            self.products[out.grad_fn] = a, b
        if func in SOFTMAX and (scores := self.reached(args[0] if args else kwargs["input"])[1]):
            self.attend(queries=scores[0][0], keys=scores[0][1])
            return self.mark(out, WEIGHTS)
        return out

    def attend(self, **tensors: Tensor) -> None:
        for role, t in tensors.items():
            self.attends[role] |= self.sources(t)

    def mark(self, t: Tensor, name: str) -> Tensor:
        """The same tensor as something new, of which `sources` knows where it came from."""
        out = New.apply(self.leaf, t)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        self.nodes[out.grad_fn] = name
        return out

    def sources(self, t: Tensor) -> set[str]:
        return self.reached(t)[0]

    def reached(self, t: Tensor) -> tuple[set[str], list[tuple[Tensor, Tensor]]]:
        """What this tensor is made of, and the factors of the products on the way."""
        found, factors, seen, left = set[str](), list[tuple[Tensor, Tensor]](), set[Any](), [t.grad_fn]
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            factors += [self.products[node]] if node in self.products else []
            if node in self.nodes:
                found.add(self.nodes[node])
            else:
                left += [after for after, _ in node.next_functions]
        return found, factors


def roles(model: Any, names: Iterable[str]) -> dict[str, frozenset[Role]]:
    """The roles of those of the matrices `names` that have any, of a transformers model on the meta device. Raises ValueError where the model
    does not run without values."""
    trace, blocks = Tracing(), tuple(f"{b}." for b in blocks_of(model))
    inside = [name for name in names if name.startswith(blocks) and isinstance(model.get_submodule(name), nn.Linear)]
    was = model.training
    try:
        with contextlib.ExitStack() as stack:
            for name in inside:
                linear: Any = model.get_submodule(name)

                def forward(x: Tensor, linear: Any = linear, name: str = name) -> Tensor:
                    trace.into[name] |= trace.sources(x)
                    return trace.mark(F.linear(x, linear.weight, linear.bias), name)

                stack.enter_context(instead(linear, forward))
            for block in blocks:
                enter = model.get_submodule(block[:-1]).register_forward_pre_hook(_entering(trace), with_kwargs=True)
                stack.callback(enter.remove)
            with torch.inference_mode(False), torch.enable_grad(), Tally(), trace:
                task = tasks.of(model)
                model.eval()
                task.states(model, task.blank(1, TOKENS))
    except Exception as e:  # a forward can want values in as many ways as there are forwards
        if out_of_memory(e):
            raise
        reason = (str(e).splitlines() or ["no reason given"])[0].rstrip(".")
        raise Invalid(f"{type(model).__name__} does not run without its values, so what its matrices do is not known ({reason})") from e
    finally:
        model.train(was)
    found: dict[str, set[Any]] = {name: {role for role, sources in trace.attends.items() if name in sources} for name in inside}
    inner = set[str]().union(*(sources for sources in trace.into.values() if STATES not in sources))
    for name, sources in trace.into.items():
        if ATTENDED in sources:
            found[name].add("attention_output")
        elif not found[name] and sources and STATES not in sources and name not in inner:
            found[name].add("feed_forward_output")
    return {name: frozenset(own) for name, own in found.items() if own}


def _entering(trace: Tracing) -> Any:
    def enter(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (trace.mark(args[0], STATES), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": trace.mark(kwargs["hidden_states"], STATES)}

    return enter


def lying(model: Any, names: Iterable[str], adapter: Any, named: bool) -> tuple[dict[str, Any], list[str]]:
    """The adapter of each of these matrices, None for one without, and notices: over all that are `named`, else where its paper puts it. Raises
    ValueError where there is no such place."""
    names = list(names)
    if named or adapter.roles is None:
        return placed(model, names, adapter), []
    who, does = type(adapter).__name__, roles(model, names)
    own = {name: adapter.in_role(does[name]) if does.get(name, frozenset()) & adapter.roles else None for name in names}
    there = [name for name, a in own.items() if a is not None]
    said = " and ".join(sorted(role.replace("_", " ") for role in adapter.roles))
    if not there:
        raise Invalid(f"{who} lies over {said}, and no planned matrix of {type(model).__name__} is such: name some in target_modules")
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in there))
    notices = [f"{who} lies over {len(there)} of {len(names)} matrices ({kinds}: {said}), as in its paper; target_modules names others"]
    fused = [name for name in there if len(does[name] & {"queries", "keys", "values"}) > 1 and "queries" in does[name] - adapter.roles]
    if fused:
        notices.append(f"{fused[0]} makes queries as well, and {who} takes them with it")
    return own, notices
