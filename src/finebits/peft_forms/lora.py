"""LoRA and rsLoRA (PEFT: LoraConfig): B as lora_B, A as lora_A, rank and alpha of every module, where they differ as rank_pattern and
alpha_pattern. Over a table of embeddings, which PEFT adapts as a map of one-hot words, they are Aᵀ and Bᵀ, the other way round.

Nothing is folded: training goes on there, or here, as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.adapters.base import Params
from finebits.adapters.lora import LoRA
from finebits.peft_forms._experts import KEY
from finebits.peft_forms._lowrank import IDLE, READS, STARTS, A, B, factors, said
from finebits.peft_forms.base import Axes, Form, Held, Written


@dataclass(frozen=True)
class Lora(Form):
    """s·B A with s = α/r, or α/√r under use_rslora.

    >>> p = {"A": torch.ones(2, 3), "B": torch.ones(4, 2)}
    >>> {k: tuple(t.shape) for k, t in Lora().write({"q": Held(fb.LoRA(rank=2), p)}).tensors["q"].items()}
    {'lora_A.weight': (2, 3), 'lora_B.weight': (4, 2)}
    """

    peft: ClassVar[str] = "LORA"
    adapter: ClassVar[type] = LoRA
    parts: ClassVar[tuple[str, ...]] = (A, B)
    reads: ClassVar[frozenset[str]] = READS
    idle: ClassVar[frozenset[str]] = IDLE | {KEY}
    starts: ClassVar[tuple[str, tuple[Any, ...]]] = STARTS
    dropout: ClassVar[str] = "lora_dropout"
    axes: ClassVar[Mapping[str, Axes]] = {A: "windows", B: "places"}
    looked: ClassVar[Mapping[str, str]] = {A: "lora_embedding_B", B: "lora_embedding_A"}
    tokens: ClassVar[bool] = True

    def write(self, held: Mapping[str, Held]) -> Written:
        return Written(said(held), {module: {A: h.p["A"], B: h.p["B"]} for module, h in held.items()}, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        held = {}
        for module, p in found.items():
            r, alpha, tensors = factors(settings, module, p, shapes[module])
            held[module] = Held(LoRA(r, alpha, "rslora" if settings.get("use_rslora") else "lora"), tensors)
        return held
