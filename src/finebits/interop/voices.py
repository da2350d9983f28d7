"""A model to talk to, whatever it lies in, and what it can speak with: the adapters of a run before and after training, or adapters out of
folders over one base. Which of them speaks is changed without loading anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits import registry
from finebits.arithmetic import dtypes
from finebits.build import MOVED, Adapted, all_hosts
from finebits.errors import Invalid
from finebits.files import read_json
from finebits.interop.adapter_set import AdapterSet
from finebits.interop.checkpoint import config_of, fingerprint
from finebits.interop.from_peft import belonging, load_peft
from finebits.interop.hf import folder_of, load, load_planned, ready
from finebits.interop.peft_folder import base_named, opened
from finebits.interop.selecting import attention, meta
from finebits.interop.tokenizer import stops_of
from finebits.layouts.packed import METHOD
from finebits.plan.base import Plan
from finebits.plan.levers import WIDTHS, Levers
from finebits.store import read as saved_in

TUNED, UNTUNED, NONE = "tuned", "untuned", "none"


class Voices:
    """`model` with its `processor`; `folder` is the one that its config and tokenizer came from. `names` are what it can speak with; `speaking`
    is one of them, or None: the base alone.

    >>> voices = Voices(torch.nn.Linear(2, 2), None, Path("m"))
    >>> voices.names, voices.speaking
    ((), None)
    >>> voices.switch("formal")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: there is no adapter 'formal'; there are: none
    """

    def __init__(self, model: Any, processor: Any, folder: Path) -> None:
        self.model, self.processor, self.folder = model, processor, folder
        self.adapters: AdapterSet | None = None
        self.speaking: str | None = None
        self.told: list[str] = []  # what is to be known of adapters and bases
        self._own: dict[str, list[tuple[nn.Module, list[str]]]] = {}  # by voice, which adapters of every host are active
        self._starts: list[tuple[Tensor, Tensor]] = []  # parameters of the adapter, with what the other of tuned and untuned holds
        self._started = False

    @property
    def names(self) -> tuple[str, ...]:
        """What it can speak with, beside the base alone."""
        return (*(n for n in self._own if n != NONE), *(self.adapters.kinds if self.adapters is not None else ()))

    @property
    def stops(self) -> list[int]:
        """The ids that its answers end at."""
        return stops_of(self.folder, self.processor)

    def switch(self, name: str | None) -> None:
        """Speak with this adapter, or (None, "none") with the base alone."""
        name = None if name == NONE else name
        if name is not None and name not in self.names:
            raise Invalid(f"there is no adapter {name!r}; there are: {', '.join((*self.names, NONE)) if self.names else NONE}")
        if self.adapters is not None:
            self.adapters.weigh({} if name is None else {name: 1.0})
        for host, active in self._own.get(name or NONE, []):
            cast(Any, host).active = active
        if self._starts and (name == UNTUNED) != self._started and name is not None:
            self._started = not self._started
            for i, (p, other) in enumerate(self._starts):
                self._starts[i] = (p, p.data)
                p.data = other
        self.speaking = name

    @contextlib.contextmanager
    def as_(self, name: str | None) -> Iterator[None]:
        """Inside, it speaks with another."""
        before = self.speaking
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def own(self, name: str, start: Path | None = None) -> Voices:
        """The adapters that the model was loaded with are one voice, called `name`; those that a saved `start` has in their places another."""
        found = list(all_hosts(self.model))
        self._own[name] = [(h, list(h.active)) for _, h in found]
        self._own[NONE] = [(h, [a for a in h.active if a == MOVED]) for _, h in found]
        if start is not None and (starts := _starts(self.model, start)) is not None:
            self._starts = starts
            self._own[UNTUNED] = self._own[name]
        self.speaking = name
        return self


def _starts(model: nn.Module, start: Path) -> list[tuple[Tensor, Tensor]] | None:
    """(parameter, what it started as) of all adapters; None where what was tuned is not adapters alone, or the start has others."""
    saved, found = saved_in(start), list[tuple[Tensor, Tensor]]()
    if saved.tuned or saved.hosts.keys() != dict(all_hosts(model)).keys():
        return None
    for name, host in all_hosts(model):
        for key, kind in cast(Any, host).kinds.items():
            if not isinstance(host, Adapted) or kind.itself or kind.form == "codes" or key not in saved.hosts[name]["adapters"]:
                return None
            was = registry.from_json("adapters", saved.hosts[name]["adapters"][key])
            p = was.unpacked(saved.adapter.get(name, {}).get(key, {}), *host.weight.shape)
            for k, t in cast(Any, host).p[key].items():
                if t.requires_grad:
                    if k not in p or p[k].shape != t.shape:
                        return None
                    found.append((t, p[k].to(t.dtype).to(t.device)))
    return found


def saved(folder: Path, start: Path | None = None) -> Voices:
    """Of a folder that `finebits.save` wrote; with the `start` of the same run, it speaks untuned too."""
    model, processor = load(folder)
    return Voices(model.eval(), processor, folder_of(saved_in(folder).plan.model)).own(TUNED, start)


def plan_for(name: str | Path) -> Plan:
    """A plan of a model as it is: held in its own dtype, computed in what this machine multiplies well, on a GPU where there is one."""
    folder = folder_of(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = str(config_of(folder).dtype or torch.float32).removeprefix("torch.")
    held, compute = dtypes(own if own in WIDTHS else "float32", device)
    levers = Levers(dtype=held, compute=None if compute == held else compute, device=device)
    levers = replace(levers, attn_implementation=attention(meta(folder)))
    return Plan({}, model=str(name), model_hash=fingerprint(folder), levers=levers)


def whole(name: str | Path) -> Voices:
    """Of a model: a folder, a GGUF file, package:NAME or a hub id; one that finebits packed stays packed."""
    folder = folder_of(name)
    method = (read_json(folder / "config.json").get("quantization_config") or {}).get("quant_method")
    if method == METHOD:
        from transformers import AutoModelForCausalLM

        import finebits.interop.quantizer  # noqa: F401  # by which transformers knows the method

        made: Any = AutoModelForCausalLM.from_pretrained(folder)
        model, processor = ready(made, folder)
    else:
        model, processor = load_planned(plan_for(name))
    return Voices(model.eval(), processor, folder)


def voices(name: str | Path, adapters: Sequence[str | Path] = ()) -> Voices:
    """Of a model with adapters over it, out of folders of PEFT, called by the folders' names; the first of them speaks."""
    made = whole(name)
    if not adapters:
        return made
    made.adapters = AdapterSet(made.model)
    for place in map(Path, adapters):
        called = place.resolve().name.replace(".", "-") or "adapter"
        while called in made.names or called in (NONE, MOVED):
            called += "_"
        made.told += belonging(place, opened(place)[0], made.folder, None)
        made.adapters.load(called, place)
    made.switch(made.names[0])
    return made


def of_peft(folder: Path) -> Voices:
    """Of a folder of PEFT over the base that it names, or that lies in it."""
    model = whole(base_for(folder))
    model.told += belonging(folder, opened(folder)[0], model.folder, None)
    return Voices(load_peft(folder, model.model), model.processor, model.folder).own(TUNED)


def base_for(folder: Path) -> str:
    """Where the base of a folder of PEFT lies: inside of it, or where it says. Raises ValueError where it names none."""
    if not (base := base_named(folder)):
        raise Invalid(f"{folder} is an adapter and names no base: give its model, with --adapter {folder}")
    return base
