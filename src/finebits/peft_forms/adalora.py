"""AdaLoRA (PEFT: AdaLoraConfig), the gated update B diag(λ) A: lora_E is λ, lora_A and lora_B are A and B.

PEFT multiplies by lora_alpha / (init_r + 10⁻⁵) everywhere, however many gates are left; what is not in that factor goes into λ. All modules have
init_r gates: ours with fewer get closed ones, of PEFT's those that rank_pattern leaves out are in no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.nn.functional import pad

from finebits.adapters.base import Params
from finebits.adapters.gated import Gated
from finebits.peft_forms.base import Form, Held, Written, check_shape, mostly

A, B, E = "lora_A", "lora_B", "lora_E"
MORE = 1e-5


@dataclass(frozen=True)
class AdaLora(Form):
    """s·B diag(λ) A.

    >>> p = {"A": torch.ones(2, 3), "B": torch.ones(4, 2), "gate": torch.tensor([0.0, 0.5])}
    >>> AdaLora().write({"q": Held(fb.Gated(rank=2, alpha=2.0), p)}).settings
    {'init_r': 2, 'target_r': 2, 'lora_alpha': 2.0, 'total_step': 1}
    """

    peft: ClassVar[str] = "ADALORA"
    adapter: ClassVar[type] = Gated
    parts: ClassVar[tuple[str, ...]] = (A, B, E)
    reads: ClassVar[frozenset[str]] = frozenset({"init_r", "lora_alpha", "rank_pattern"})
    idle: ClassVar[frozenset[str]] = frozenset(
        "r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step use_rslora megatron_core qalora_group_size".split()
    )
    starts: ClassVar[tuple[str, tuple[Any, ...]]] = "init_lora_weights", (True, False, None)
    dropout: ClassVar[str] = "lora_dropout"

    def write(self, held: Mapping[str, Held]) -> Written:
        whole = max(h.adapter.rank for h in held.values())
        alpha = mostly({module: h.adapter.alpha for module, h in held.items()})[0]
        tensors = {}
        for module, (adapter, p, _) in held.items():
            more, gate = whole - adapter.rank, p["gate"] * (adapter.s * (whole + MORE) / alpha)
            rows = {A: pad(p["A"], (0, 0, 0, more)), E: pad(gate[:, None], (0, 0, 0, more))}
            tensors[module] = rows | {B: pad(p["B"], (0, more))}
        return Written({"init_r": whole, "target_r": whole, "lora_alpha": alpha, "total_step": 1}, tensors, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        held, whole = {}, int(settings["init_r"])
        alpha = float(settings["lora_alpha"]) if settings["lora_alpha"] > 0 else float(whole)
        kept: dict[str, int] = {key.partition(f".{E}")[0]: sum(open) for key, open in (settings.get("rank_pattern") or {}).items()}
        for module, p in found.items():
            r, (m, n) = kept.get(module, whole), shapes[module]
            if r == 0:
                continue
            tensors = {"A": check_shape(module, A, p[A], (r, n)), "B": check_shape(module, B, p[B], (m, r))}
            held[module] = Held(Gated(r, r * alpha / (whole + MORE)), tensors | {"gate": check_shape(module, E, p[E], (r, 1))[:, 0]})
        return held
