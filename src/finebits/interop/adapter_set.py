"""Several adapters over one base: which of them speak, and how loudly, is changed without touching a tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from finebits import registry
from finebits.adapters.base import Adapter
from finebits.build import MOVED, Adapted, generator, hosts
from finebits.errors import Invalid
from finebits.interop.peft_folder import CONFIG, read
from finebits.peft_forms.base import Held
from finebits.qtensor import QTensor
from finebits.store import MANIFEST
from finebits.store import read as saved_in


class AdapterSet:
    """Adapters by name over the linear layers of `model`: one that finebits built, or that transformers loaded, packed or dense, without an
    adapter of its own. The model becomes their host; none speaks until `switch`.

    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> net = lambda: torch.nn.Sequential(torch.nn.Linear(64, 8))
    >>> model, x = net(), torch.ones(1, 64)
    >>> adapters = fb.AdapterSet(model)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     for name in ("formal", "brief"):
    ...         config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    ...         get_peft_model(net(), config).save_pretrained(f"{place}/{name}")
    ...         adapters.load(name, f"{place}/{name}")
    >>> bare = model(x)
    >>> adapters.switch("formal")
    >>> torch.equal(model(x), bare)
    False
    >>> with adapters.disable():
    ...     print(torch.equal(model(x), bare))
    True
    >>> adapters.weigh({"formal": 0.7, "brief": 0.3})
    >>> adapters.speaking
    {'formal': 0.7, 'brief': 0.3}
    """

    def __init__(self, model: nn.Module) -> None:
        taken = next((name for name, host in hosts(model) if set(host.active) - {MOVED}), None)
        if taken is not None:
            raise Invalid(f"{taken} has an adapter already, over which others would lie: give the base without")
        self.model = model
        self.kinds: dict[str, dict[str, Adapter]] = {}  # as they were loaded: adapter -> module -> kind
        self.hosts = dict(hosts(model))
        self.speaking: dict[str, float] = {}

    def load(self, name: str, folder: str | Path) -> None:
        """An adapter out of a folder of PEFT, or of one that `finebits.save` wrote over this very base. Raises ValueError where it lies over
        what is no linear layer, holds more than an adapter, or belongs to another base."""
        if name in self.kinds or name == MOVED or not name or "." in name:
            raise Invalid(f"an adapter cannot be called {name!r}: there is one of that name, or it is empty or has a dot in it")
        folder = Path(folder)
        held, seed = held_in(folder, self.model)
        of = dict(self.model.named_modules())
        for module, (kind, p, _) in held.items():
            linear = of.get(module)
            if not isinstance(linear, nn.Linear) or kind.over != "matrix":
                raise Invalid(
                    f"{folder} has an adapter over {module}, which is no linear layer here: finebits.load_peft lays one such adapter"
                )
            if kind.shared:
                raise Invalid(f"{type(kind).__name__} has tensors that modules hold together: finebits.load_peft lays one such adapter")
        for module, (kind, p, _) in held.items():
            host = self.hosts[module] = Adapted.over(cast(nn.Linear, of[module]))
            active = list(host.active)
            host.add(name, kind, generator(seed, module), p)
            host.active = active
        self.kinds[name] = {module: h.adapter for module, h in held.items()}

    def switch(self, name: str) -> None:
        """This adapter alone, as it was trained. No tensor is copied or made: every layer is told a name.

        >>> fb.AdapterSet(torch.nn.Linear(2, 2)).switch("formal")
        Traceback (most recent call last):
            ...
        finebits.errors.Invalid: there is no adapter 'formal'; loaded are none
        """
        self.weigh({name: 1.0})

    def weigh(self, weights: Mapping[str, float]) -> None:
        """These adapters together, each update times its weight (above 0): Σ w·s·B A of low-rank ones, exactly. No tensor is touched."""
        for name, w in weights.items():
            if name not in self.kinds:
                raise Invalid(f"there is no adapter {name!r}; loaded are {', '.join(self.kinds) or 'none'}")
            if not w > 0:
                raise Invalid(f"the weight of {name} is {w}; it must be above 0 (leave an adapter out to silence it, merge to subtract it)")
            odd = next((k for k in self.kinds[name].values() if k.form != "product" or not hasattr(k, "alpha")), None)
            if odd is not None and (len(weights) > 1 or w != 1):
                raise Invalid(f"{name} is {type(odd).__name__}, which is no scaled sum: switch to it alone")
        scaled = {(k, w): k if w == 1 else replace(cast(Any, k), alpha=cast(Any, k).alpha * w) for k, w in self._distinct(weights)}
        for module, host in self.hosts.items():
            host.active = [MOVED] if MOVED in host.kinds else []
            for name, w in weights.items():
                if (kind := self.kinds[name].get(module)) is not None:
                    host.kinds[name] = scaled[kind, w]
                    host.active.append(name)
        self.speaking = dict(weights)

    def _distinct(self, weights: Mapping[str, float]) -> set[tuple[Adapter, float]]:
        return {(kind, w) for name, w in weights.items() for kind in self.kinds[name].values()}

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """The base alone, inside of the block."""
        before = self.speaking
        self.weigh({})
        try:
            yield
        finally:
            self.weigh(before)

    def remove(self, name: str) -> None:
        """Take one off, and free its memory."""
        if name in self.speaking:
            self.weigh({k: w for k, w in self.speaking.items() if k != name})
        for module in self.kinds.pop(name, {}):
            self.hosts[module].remove(name)


def held_in(folder: Path, model: nn.Module) -> tuple[dict[str, Held], int]:
    """(adapters by module, the seed of what they draw anew) of a folder of PEFT, or of one that `finebits.save` wrote over the base of this very
    `model`. Raises ValueError where it holds more than adapters, or was trained over another base."""
    if (folder / MANIFEST).is_file() and not (folder / CONFIG).is_file():
        return _saved(folder, model)
    given = read(folder, model)
    if given.others:
        raise Invalid(f"{folder} holds {next(iter(given.others))} beside its adapter: finebits.load_peft puts it in its place")
    return dict(given.held), 0


def _saved(folder: Path, model: nn.Module) -> tuple[dict[str, Held], int]:
    saved, found = saved_in(folder), dict[str, Held]()
    if saved.tuned:
        raise Invalid(f"{folder} holds {next(iter(saved.tuned))} beside its adapters: finebits.load puts it in its place")
    for module, parts in saved.bases.items():
        W = cast(Any, model.get_submodule(module)).weight
        own = W.parts if isinstance(W, QTensor) else {"": W}
        if own.keys() != parts.keys() or any(not torch.equal(own[k].cpu(), t) for k, t in parts.items()):
            raise Invalid(f"{folder} was trained over another {module} than the model's: load it with finebits.load")
    for module, line in saved.hosts.items():
        if MOVED in line["active"]:
            raise Invalid(f"the start of {folder} took a part out of {module}, which this base has: load it with finebits.load")
        for key in (k for k in line["active"] if k != MOVED):
            kind, shape = registry.from_json("adapters", line["adapters"][key]), saved.weights.get(module, {}).get("shape")
            p = saved.adapter.get(module, {}).get(key, {})
            sizes = shape or cast(Any, model.get_submodule(module)).weight.shape
            found[module] = Held(kind, kind.unpacked(p, *sizes))
    return found, saved.plan.seed
