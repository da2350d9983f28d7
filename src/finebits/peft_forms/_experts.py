"""LoRA over the tensor of a layer's experts, as PEFT has it (`target_parameters`), and over each expert's matrix, as it is here.

    A (E·r, n): A_e below each other      B (m, r·E): of every column of B, first that of expert 0, then that of expert 1, …

A module of PEFT's wraps one tensor, so that those of several lie within each other: the last of a layer has the name of the module, the one
before `base_layer` behind it, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from finebits.adapters.base import Params
from finebits.adapters.lora import LoRA
from finebits.errors import Invalid
from finebits.experts import tensors
from finebits.peft_forms._lowrank import A, B

KEY = "target_parameters"


def check(adapters: Mapping[str, Any], experts: Mapping[str, int], dropout: float) -> None:
    """Raise ValueError where PEFT has not these adapters, by module, over tensors of so many experts.

    >>> check({"up.0": fb.LoRA(rank=2), "up.1": fb.LoRA(rank=4)}, {"up": 2}, 0.0)
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: up.1: PEFT has one adapter for all experts of a layer, and this one differs from that of up.0
    """
    for tensor, count in experts.items():
        own = {name: adapters.get(name) for name in (f"{tensor}.{e}" for e in range(count))}
        if not any(own.values()):
            continue
        first, adapter = next(iter(own.items()))
        odd = next((name for name, other in own.items() if other != adapter), None)
        if odd is not None:
            raise Invalid(f"{odd}: PEFT has one adapter for all experts of a layer, and this one differs from that of {first}")
        if not isinstance(adapter, LoRA):
            raise Invalid(f"{first}: over experts PEFT has LoRA alone, and this is {type(adapter).__name__}")
        if dropout:
            raise Invalid(f"{first}: over experts PEFT has no dropout, and here it is {dropout:g}")


def joined(factors: Mapping[str, Params], model: nn.Module) -> tuple[dict[str, Params], dict[str, str]]:
    """({name: A and B}, {tensor: the module that PEFT has it under}): experts' as one by the name of their tensor, zeros for those without."""
    of, left = tensors(model), dict(factors)
    whole, around = dict[str, Params](), dict[str, list[str]]()
    for tensor, layers in of.items():
        own = [left.pop(name, None) for name in layers]
        like = next((p for p in own if p is not None), None)
        if like is None:
            continue
        parts = [{k: torch.zeros_like(t) for k, t in like.items()} if p is None else p for p in own]
        whole[tensor] = {"A": torch.cat([p["A"] for p in parts]), "B": torch.stack([p["B"] for p in parts], -1).flatten(1)}
        around.setdefault(tensor.rpartition(".")[0], []).append(tensor)
    return left | whole, _modules(around)


def parted(found: Mapping[str, Params], settings: Mapping[str, Any], model: nn.Module) -> tuple[dict[str, Params], dict[str, Any]]:
    """The inverse: (what a folder's modules hold by names here, settings whose patterns fit these names). Raises ValueError where the model
    holds its experts in one tensor, or the folder names a tensor that is none of experts."""
    wanted, of, left = settings.get(KEY) or [], tensors(model), dict(found)
    around: dict[str, list[str]] = {}
    for end in wanted:
        if not any(_ends(tensor, end) for tensor in of):
            raise Invalid(
                f"{KEY} names {end}, and the model has no experts of that name, one by one: give the model by its name or folder, or as "
                "finebits has loaded it"
            )
    for tensor in of:
        if any(_ends(tensor, end) for end in wanted):
            around.setdefault(tensor.rpartition(".")[0], []).append(tensor)
    for tensor, module in _modules(around).items():
        if (p := left.pop(module, None)) is None:
            raise Invalid(f"{KEY} names {tensor}, and the folder has no tensors for it: the copy is not complete")
        layers = of[tensor]
        if p[A].shape[0] % len(layers) or p[B].shape[1] != p[A].shape[0]:
            raise Invalid(
                f"{tensor}: its {len(layers)} experts do not part {tuple(p[A].shape)} and {tuple(p[B].shape)}: give its own model"
            )
        own = p[A].unflatten(0, (len(layers), -1)), p[B].unflatten(1, (-1, len(layers)))
        left |= {name: {A: own[0][e], B: own[1][:, :, e]} for e, name in enumerate(layers)}
    patterns = {k: {rf"({p})(\.\d+)?": v for p, v in (settings.get(k) or {}).items()} for k in ("rank_pattern", "alpha_pattern")}
    return left, {**settings, **patterns} if around else dict(settings)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _modules(around: Mapping[str, list[str]]) -> dict[str, str]:
    """Under which module PEFT has each of the tensors of a layer."""
    return {tensor: owner + ".base_layer" * (len(inside) - 1 - i) for owner, inside in around.items() for i, tensor in enumerate(inside)}
