"""The host of an adapter over what is no matrix: the same module with its class replaced, as `Adapted` is the same linear.

Base keys stay, and an adapter adds `p.<name>.<param>`. `isinstance` holds, and the signature of the forward is the module's own.

A table of embeddings is such a host (`Table`): its adapter gives rows (`finebits.adapters.base.Looks`). A head whose weight is the same tensor
goes on multiplying by the bare table, or follows it (`follow`), as PEFT has both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits.adapters.base import Adapter, Base, Looks, Over, Params, Place
from finebits.anatomy import CACHES, Before, Words, agrees, attending, cache_of, feed_forward, keys_of, size_of
from finebits.errors import Invalid
from finebits.formats.base import SLAB
from finebits.lookup import Tied, is_linear


class Carrier(nn.Module):
    """A module under one adapter. Made by `Carrier.over`, never constructed.

    `noted` is what the adapter's last forward pass has left for a rule, while one `listens`.

    >>> class MLP(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up_proj, self.down_proj, self.act_fn = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4), torch.nn.ReLU()
    ...     def forward(self, x):
    ...         return self.down_proj(self.act_fn(self.up_proj(x)))
    >>> mlp = MLP()
    >>> host = Carrier.over(mlp, "feed_forward")
    >>> host is mlp, isinstance(mlp, MLP), host.size
    (True, True, (8, 4))
    """

    p: nn.ModuleDict
    kinds: dict[str, Adapter]
    active: list[str]
    drops: float  # of what the adapter is given; the module may have a `dropout` of its own
    place: Place
    listens: bool
    noted: Any

    @classmethod
    def over(cls, module: nn.Module, place: Place) -> Carrier:
        """The same module, now a host. Raises ValueError where it is no such place, and where another library's hook would be bypassed."""
        if isinstance(module, cls):
            return module
        size_of(module, place)
        if hasattr(module, "_hf_hook") or "forward" in vars(module):
            raise Invalid("its forward was already replaced by a hook (accelerate?): build first, dispatch afterwards")
        if place == "feed_forward":
            agrees(module)
        module.__class__ = _looking(type(module)) if place == "table" else _carrying(type(module))
        host = cast(Carrier, module)
        host.p, host.kinds, host.active, host.drops, host.place = nn.ModuleDict(), {}, [], 0.0, place
        host.listens, host.noted = False, None
        for p in host.parameters():
            p.requires_grad_(False)
        return host

    @property
    def size(self) -> tuple[int, int]:
        """What an adapter over it is sized by."""
        return size_of(self, self.place)

    def add(self, name: str, adapter: Adapter, gen: torch.Generator, start: Params | None = None) -> None:
        """Lay the adapter over the module; `start` is completed by the adapter. Parameters are float32 where the module is."""
        base, device = cast(Any, self.view()), next(iter(self.parameters())).device
        drawn = adapter.buffers(base, gen)
        drawn = adapter.params(base, gen, start or {}) | drawn
        self.hold(name, adapter, {k: (v.float() if v.is_floating_point() else v).to(device).contiguous() for k, v in drawn.items()})

    def hold(self, name: str, adapter: Adapter, tensors: Params) -> None:
        """Lay the adapter over the module with just these tensors."""
        if self.kinds:
            raise Invalid(f"there is an adapter over it already ({next(iter(self.kinds))}), and a {type(self).__name__} takes one")
        self.p[name] = nn.ParameterDict({k: nn.Parameter(v, requires_grad=k not in adapter.frozen) for k, v in tensors.items()})
        self.kinds[name] = adapter
        self.active.append(name)
        if self.place == "attention":
            for module in attending(self):
                module.register_forward_pre_hook(Reached(self), with_kwargs=True)

    def remove(self, name: str) -> None:
        """Take the adapter off."""
        del self.p[name], self.kinds[name]
        self.active = [a for a in self.active if a != name]
        for module in self.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, Reached):
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)

    def off(self) -> nn.Module:
        """The module as it was before it became a host."""
        for name in list(self.kinds):
            self.remove(name)
        self.__class__ = cast(Any, _kind(self))
        for key in ("kinds", "active", "drops", "place", "listens", "noted"):
            del self.__dict__[key]
        del self._modules["p"]
        return self

    def tensors(self, name: str, dtype: torch.dtype | None = None) -> Params:
        """Its tensors by name, cast to `dtype` if given, but for those that compute in float32."""
        kept = self.kinds[name].kept
        params = cast(nn.ParameterDict, self.p[name])
        return {k: v if dtype is None or k in kept or not v.is_floating_point() else v.to(dtype) for k, v in params.items()}

    def view(self) -> Any:
        """The module as an adapter sees it."""
        whole = functools.partial(_kind(self).forward, self)
        if self.place == "feed_forward":
            return feed_forward(self, whole, self._drop, self._note)
        return Words(self, whole, self.size)

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.drops, self.training) if self.drops else x

    def _note(self, noted: Any) -> None:
        if self.listens:
            self.noted = noted

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last forward pass has left, which belongs to its graph: copies have none of it."""
        return self.__dict__ | {"noted": None}


class Table(Carrier, nn.Embedding):
    """A table of embeddings under an adapter that gives rows. Made by `Carrier.over`, never constructed.

    Rows are computed in float32, and are in the table's dtype as they leave, but where it is `exact`. Whatever else the class of the table does
    to its rows (some scale them) it does to these.

    >>> words, start = torch.nn.Embedding(3, 2), {"A": torch.ones(1, 2), "B": torch.ones(3, 1)}
    >>> Carrier.over(words, "table").add("default", fb.LoRA(rank=1, alpha=2), torch.Generator(), start)
    >>> words(torch.tensor([1])) - words.weight[1]
    tensor([[2., 2.]], grad_fn=<SubBackward0>)
    """

    exact: bool = False

    def view(self) -> Base:
        return Base(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        bare = super().forward(input)
        rows = bare.float()
        for name in self.active:
            rows = cast(Looks, self.kinds[name]).rows(self.tensors(name), input, rows)
        return rows if self.exact else rows.to(bare.dtype)

    def made(self, dtype: torch.dtype) -> Tensor:
        """The table with its adapters in it, dense, a few rows of it float32 at a time."""
        W = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        step = max(1, SLAB // self.embedding_dim)
        for ids in torch.arange(len(W), device=W.device).split(step):
            rows = nn.functional.embedding(ids, self.weight).float()
            for name in self.active:
                rows = cast(Looks, self.kinds[name]).rows(self.tensors(name), ids, rows)
            W[ids[0] : ids[-1] + 1] = rows.to(dtype)
        return W


class Following(Tied):
    """A head whose weight is a table's: it multiplies by what that is under its adapters. Made by `follow`, never constructed."""

    table: tuple[Table]  # no module of this one's: its tensors are there once

    def forward(self, input: Tensor) -> Tensor:
        casts = not input.is_meta and torch.is_autocast_enabled(input.device.type)
        dtype = torch.get_autocast_dtype(input.device.type) if casts else input.dtype
        return self.over(Base(self.weight, self.bias), dtype)(input)

    def over(self, base: Any, dtype: torch.dtype) -> Any:
        """The table's adapters over a base that computes what it does without."""
        (host,), layer = self.table, base
        for name in host.active:
            layer = Over(host.kinds[name], host.tensors(name, dtype), layer)
        return layer


def tied(model: nn.Module, table: nn.Module) -> dict[str, nn.Module]:
    """The other modules whose weight is the table's, by name.

    >>> words, head = torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3)
    >>> head.weight = words.weight
    >>> list(tied(torch.nn.ModuleDict({"words": words, "head": head}), words))
    ['head']
    """
    return {n: m for n, m in model.named_modules() if m is not table and getattr(m, "weight", None) is table.weight}


def follow(model: nn.Module, host: Carrier) -> None:
    """Let whatever is tied to a table follow its adapters. Raises ValueError where that is no head."""
    for module in followers(tied(model, host)):
        module.__class__ = Following
        cast(Following, module).table = (cast(Table, host),)


def followers(modules: Mapping[str, nn.Module]) -> Iterable[nn.Module]:
    """Those that can follow a table, which are all or it is an error."""
    for name, module in modules.items():
        if not is_linear(module):
            raise Invalid(f"{name} is tied to the table of embeddings, and a {type(module).__name__} cannot follow its adapter")
    return modules.values()


class Reached:
    """A prefix for attention that is computed again from its block's input: checkpoints hand no cache on."""

    def __init__(self, host: Carrier) -> None:
        self.host = host

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        host = self.host
        if not host.active or any(kwargs.get(name) is not None for name in CACHES):
            return None
        adapter: Any = host.kinds[host.active[0]]
        heads, size, _ = keys_of(host)
        return args, kwargs | {str(cache_of(module)): Before(adapter.prefix(host.tensors(host.active[0])), (heads, size))}


@functools.cache
def _carrying(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of modules that is what it was, but for the adapter."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *positional: Any, **named: Any) -> Any:
        if not self.active:
            return kind.forward(self, *positional, **named)
        (name,) = self.active
        adapter = self.kinds[name]
        if self.place != "feed_forward":
            keys = list(inspect.signature(kind.forward).parameters)[1:]
            return adapter.forward(self.tensors(name), dict(zip(keys, positional, strict=False)) | named, self.view())
        x = positional[0] if positional else next(iter(named.values()))
        casts = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
        return adapter.forward(self.tensors(name, dtype), x, self.view())

    members = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__, "finebits_kind": kind}
    return type(kind.__name__, (Carrier, kind), members)


@functools.cache
def _looking(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of tables that is what it was, but for the adapter: that stands where rows are looked up, behind what is done to them."""
    bases = (Table,) if kind is nn.Embedding else (kind, Table)
    return type(kind.__name__, bases, {"__module__": kind.__module__, "__doc__": kind.__doc__, "finebits_kind": kind})


def _kind(host: Carrier) -> type[nn.Module]:
    return cast(Any, type(host)).finebits_kind


def carriers(model: nn.Module) -> Iterator[tuple[str, Carrier]]:
    """Every host of a model that is no matrix, by name.

    >>> list(carriers(torch.nn.Linear(2, 2)))
    []
    """
    for name, module in model.named_modules():
        if isinstance(module, Carrier):
            yield name, module


def tables(model: nn.Module) -> dict[str, Table]:
    """Those of them that are tables.

    >>> tables(torch.nn.Embedding(2, 2))  # no adapter lies over it
    {}
    """
    return {name: host for name, host in carriers(model) if isinstance(host, Table)}


def lay(
    model: nn.Module,
    name: str,
    key: str,
    adapter: Adapter,
    gen: torch.Generator,
    start: Mapping[str, Tensor],
    dropout: float,
    follows: bool = False,
) -> Carrier:
    """Lay an adapter over the module of this name, a head that is tied to it following or not. Raises ValueError that names it."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise Invalid(f"an adapter is to lie over {name}, and the model has no such module: the plan was made for another model") from None
    try:
        if isinstance(module, nn.Embedding):
            looks(adapter)
        host = Carrier.over(module, "table" if isinstance(module, nn.Embedding) else adapter.over)
        host.add(key, adapter, gen, dict(start))
        if isinstance(host, Table) and (follows or adapter.over == "table"):
            follow(model, host)
    except ValueError as e:
        raise Invalid(f"{name or 'the model'}: {e}") from e
    host.drops = dropout
    return host


def looks(adapter: Adapter) -> None:
    """Raise ValueError where an adapter cannot lie over a table of embeddings.

    >>> looks(fb.HiRA())
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: HiRA cannot lie over a table of embeddings: its update is no product L R of which rows are looked up; take lora
    """
    if not isinstance(adapter, Looks) or (adapter.admits is not None and "zeros" not in adapter.admits):
        who = type(adapter).__name__
        raise Invalid(f"{who} cannot lie over a table of embeddings: its update is no product L R of which rows are looked up; take lora")
