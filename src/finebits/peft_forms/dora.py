"""DoRA (PEFT: LoraConfig with use_dora): factors as LoRA has them, the rows' trained lengths as lora_magnitude_vector.

PEFT's use_rslora goes into alpha: s is one number here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.adapters.base import Params
from finebits.adapters.dora import DoRA
from finebits.peft_forms._lowrank import IDLE, READS, STARTS, A, B, factors, said
from finebits.peft_forms.base import Axes, Form, Held, Written, check_shape

MAG = "lora_magnitude_vector"


@dataclass(frozen=True)
class Dora(Form):
    """diag(mag/‖V‖) V with V = W + s·B A.

    >>> p = {"A": torch.ones(2, 3), "B": torch.ones(4, 2), "mag": torch.ones(4)}
    >>> list(Dora().write({"q": Held(fb.DoRA(rank=2), p)}).tensors["q"])
    ['lora_A.weight', 'lora_B.weight', 'lora_magnitude_vector']
    """

    peft: ClassVar[str] = "LORA"
    adapter: ClassVar[type] = DoRA
    marks: ClassVar[Mapping[str, Any]] = {"use_dora": True}
    parts: ClassVar[tuple[str, ...]] = (A, B, MAG)
    reads: ClassVar[frozenset[str]] = READS
    idle: ClassVar[frozenset[str]] = IDLE
    starts: ClassVar[tuple[str, tuple[Any, ...]]] = STARTS
    dropout: ClassVar[str] = "lora_dropout"
    axes: ClassVar[Mapping[str, Axes]] = {A: "windows", B: "places", MAG: "outputs"}
    tokens: ClassVar[bool] = True

    def write(self, held: Mapping[str, Held]) -> Written:
        return Written(said(held), {module: {A: h.p["A"], B: h.p["B"], MAG: h.p["mag"]} for module, h in held.items()}, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        held = {}
        for module, p in found.items():
            r, alpha, tensors = factors(settings, module, p, shapes[module])
            mag = check_shape(module, MAG, p[MAG], shapes[module][:1])
            held[module] = Held(DoRA(r, alpha * (math.sqrt(r) if settings.get("use_rslora") else 1.0)), tensors | {"mag": mag})
        return held
