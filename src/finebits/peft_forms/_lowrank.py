"""Ranks and scales of two factors, as PEFT says them: those that most modules have by r and lora_alpha, the others by patterns of names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from finebits.adapters.base import Params
from finebits.peft_forms.base import Held, check_shape, mostly, patterned

A, B = "lora_A.weight", "lora_B.weight"
READS = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
IDLE = frozenset({"megatron_core", "qalora_group_size", "eva_config"})
STARTS = "init_lora_weights", (True, False, None, "gaussian", "eva", "orthogonal")


def said(held: Mapping[str, Held]) -> dict[str, Any]:
    """Settings of adapters with a rank and a scale s: α/r for all, or α/√r where most are scaled so.

    >>> said({"q": Held(fb.LoRA(rank=4, alpha=2.0), {}), "k": Held(fb.LoRA(rank=4, alpha=2.0, scaling="rslora"), {})})
    {'r': 4, 'rank_pattern': {}, 'lora_alpha': 2.0, 'alpha_pattern': {'k': 4.0}, 'use_rslora': False}
    """
    scalings = {module: getattr(h.adapter, "scaling", "lora") for module, h in held.items()}
    scaling = mostly(scalings)[0]
    alphas = {}
    for module, (adapter, _, _) in held.items():
        own = scalings[module] == scaling
        alphas[module] = adapter.alpha if own else adapter.s * (math.sqrt(adapter.rank) if scaling == "rslora" else adapter.rank)
    (r, ranks), (alpha, others) = mostly({module: h.adapter.rank for module, h in held.items()}), mostly(alphas)
    return {"r": r, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": others, "use_rslora": scaling == "rslora"}


def factors(settings: Mapping[str, Any], module: str, p: Params, shape: tuple[int, int]) -> tuple[int, float, Params]:
    """(rank, alpha, A and B) of a module."""
    r, (m, n) = int(patterned(settings, "r", "rank_pattern", module)), shape
    alpha = float(patterned(settings, "lora_alpha", "alpha_pattern", module))
    return r, alpha, {"A": check_shape(module, A, p[A], (r, n)), "B": check_shape(module, B, p[B], (m, r))}
