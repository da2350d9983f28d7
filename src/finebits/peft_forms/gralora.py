"""GraLoRA (PEFT: GraloraConfig): A and B with their last two sides exchanged; the hybrid's factors are gralora_A_general and
gralora_B_general."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.adapters import gralora as paper
from finebits.adapters.base import Params
from finebits.peft_forms.base import Form, Held, Written, check_shape, one_of

A, B = "gralora_A", "gralora_B"
WHOLE = {"gralora_A_general.weight": "A_whole", "gralora_B_general.weight": "B_whole"}


@dataclass(frozen=True)
class Gralora(Form):
    """Low-rank updates of blocks.

    >>> p = {"A": torch.ones(2, 4, 3), "B": torch.ones(2, 5, 4)}
    >>> {k: tuple(t.shape) for k, t in Gralora().write({"q": Held(fb.GraLoRA(rank=4), p)}).tensors["q"].items()}
    {'gralora_A': (2, 3, 4), 'gralora_B': (2, 4, 5)}
    """

    peft: ClassVar[str] = "GRALORA"
    adapter: ClassVar[type] = paper.GraLoRA
    parts: ClassVar[tuple[str, ...]] = (A, B)
    maybe: ClassVar[tuple[str, ...]] = tuple(WHOLE)
    reads: ClassVar[frozenset[str]] = frozenset({"r", "alpha", "gralora_k", "hybrid_r"})
    dropout: ClassVar[str] = "gralora_dropout"

    def write(self, held: Mapping[str, Held]) -> Written:
        adapter = one_of([h.adapter for h in held.values()], "rank, alpha and k", "GRALORA")
        settings = {"r": adapter.rank, "alpha": adapter.alpha, "gralora_k": adapter.k, "hybrid_r": adapter.hybrid}
        whole = {part: k for part, k in WHOLE.items() if adapter.hybrid}
        tensors = {module: {A: p["A"].mT, B: p["B"].mT} | {part: p[k] for part, k in whole.items()} for module, (_, p, _) in held.items()}
        return Written(settings, tensors, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        adapter = paper.GraLoRA(*(int(settings["r"]), float(settings["alpha"]), int(settings["gralora_k"]), int(settings["hybrid_r"])))
        held = {}
        for module, p in found.items():
            own = {"A": p[A].mT, "B": p[B].mT} | {k: p[part] for part, k in WHOLE.items() if part in p}
            wanted = adapter.shapes(*shapes[module])
            held[module] = Held(adapter, {k: check_shape(module, k, own[k], shape) for k, shape in wanted.items()})
        return held
