"""LoRA and rsLoRA (PEFT: LoraConfig): B as lora_B, A as lora_A, rank and alpha of every module, where they differ as rank_pattern and
alpha_pattern.

Where α/r and α/√r are mixed, or alphas cannot be told apart by names, nothing is lost: every module has a line of its own in the patterns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.adapters.base import Params
from finebits.adapters.lora import LoRA
from finebits.peft_forms.base import Held, Written, check_rows, mostly, patterned

A, B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """s·B A with s = α/r, or α/√r under use_rslora.

    >>> p = {"A": torch.ones(2, 3), "B": torch.ones(4, 2)}
    >>> Lora().write({"q": Held(fb.LoRA(rank=2, alpha=4.0), p)}).settings
    {'r': 2, 'rank_pattern': {}, 'lora_alpha': 4.0, 'alpha_pattern': {}, 'use_rslora': False}
    """

    peft: ClassVar[str] = "LORA"
    adapter: ClassVar[type] = LoRA
    marks: ClassVar[Mapping[str, Any]] = {}
    parts: ClassVar[tuple[str, ...]] = (A, B)
    common: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[frozenset[str]] = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
    idle: ClassVar[frozenset[str]] = frozenset({"megatron_core", "qalora_group_size", "eva_config"})
    starts: ClassVar[tuple[str, tuple[Any, ...]]] = "init_lora_weights", (True, False, None, "gaussian", "eva", "orthogonal")
    dropout: ClassVar[str] = "lora_dropout"

    def write(self, held: Mapping[str, Held]) -> Written:
        stable = mostly({module: h.adapter.scaling for module, h in held.items()})[0] == "rslora"
        alphas = {module: h.adapter.s * (math.sqrt(h.adapter.rank) if stable else h.adapter.rank) for module, h in held.items()}
        same = "rslora" if stable else "lora"
        alphas |= {module: h.adapter.alpha for module, h in held.items() if h.adapter.scaling == same}
        r, ranks = mostly({module: h.adapter.rank for module, h in held.items()})
        alpha, others = mostly(alphas)
        settings = {"r": r, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": others, "use_rslora": stable}
        return Written(settings, {module: {A: h.p["A"], B: h.p["B"]} for module, h in held.items()}, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        held = {}
        for module, p in found.items():
            r, (m, n) = patterned(settings, "r", "rank_pattern", module), shapes[module]
            alpha = float(patterned(settings, "lora_alpha", "alpha_pattern", module))
            adapter = LoRA(r, alpha, "rslora" if settings.get("use_rslora") else "lora")
            held[module] = Held(adapter, {"A": check_rows(module, A, p[A], (r, n)), "B": check_rows(module, B, p[B], (m, r))})
        return held
