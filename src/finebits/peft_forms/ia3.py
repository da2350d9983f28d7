"""IA³ (PEFT: IA3Config): factors of outputs as a column, of inputs as a row; modules of the second kind are PEFT's feedforward_modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.adapters import ia3 as paper
from finebits.adapters.base import Params
from finebits.peft_forms.base import Form, Held, Written, check_shape

FACTORS = "ia3_l"


@dataclass(frozen=True)
class IA3(Form):
    """diag(l) W, or W diag(l).

    >>> IA3().write({"mlp.down": Held(fb.IA3("input"), {"l": torch.ones(3)})}).settings
    {'feedforward_modules': 'mlp\\\\.down'}
    """

    peft: ClassVar[str] = "IA3"
    adapter: ClassVar[type] = paper.IA3
    parts: ClassVar[tuple[str, ...]] = (FACTORS,)
    reads: ClassVar[frozenset[str]] = frozenset({"feedforward_modules"})
    starts: ClassVar[tuple[str, tuple[Any, ...]]] = "init_ia3_weights", (True, False, None)
    dropout: ClassVar[str] = ""

    def write(self, held: Mapping[str, Held]) -> Written:
        tensors = {
            module: {FACTORS: p["l"][:, None] if adapter.side == "output" else p["l"][None]} for module, (adapter, p, _) in held.items()
        }
        inputs = "|".join(re.escape(module) for module, h in held.items() if h.adapter.side == "input")  # a string is an expression to PEFT
        return Written({"feedforward_modules": inputs or []}, tensors, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        held, inputs = {}, settings.get("feedforward_modules") or []
        for module, p in found.items():
            m, n = shapes[module]
            turned = re.fullmatch(inputs, module) is not None if isinstance(inputs, str) else module.endswith(tuple(inputs))
            side = "input" if turned else "output"
            held[module] = Held(paper.IA3(side), {"l": check_shape(module, FACTORS, p[FACTORS], (1, n) if turned else (m, 1)).flatten()})
        return held
