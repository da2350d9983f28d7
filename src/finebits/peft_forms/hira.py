"""HiRA (PEFT: HiraConfig): A as hira_A, B as hira_B.

PEFT 0.21 gives all modules one rank, whatever its rank_pattern says: ranks that differ are filled up with zeros, and read off the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.nn.functional import pad

from finebits.adapters.base import Params
from finebits.adapters.hira import HiRA
from finebits.peft_forms.base import Axes, Form, Held, Written, check_shape

A, B = "hira_A", "hira_B"


@dataclass(frozen=True)
class Hira(Form):
    """W + W ∘ (B A).

    >>> Hira().write({"q": Held(fb.HiRA(rank=2), {"A": torch.ones(2, 3), "B": torch.ones(4, 2)})}).settings
    {'r': 2}
    """

    peft: ClassVar[str] = "HIRA"
    adapter: ClassVar[type] = HiRA
    parts: ClassVar[tuple[str, ...]] = (A, B)
    reads: ClassVar[frozenset[str]] = frozenset({"r", "rank_pattern"})
    dropout: ClassVar[str] = "hira_dropout"
    axes: ClassVar[Mapping[str, Axes]] = {A: "windows", B: "places"}

    def write(self, held: Mapping[str, Held]) -> Written:
        r, tensors = max(h.adapter.rank for h in held.values()), {}
        for module, (adapter, p, _) in held.items():
            more = r - adapter.rank
            tensors[module] = {A: pad(p["A"], (0, 0, 0, more)), B: pad(p["B"], (0, more))}
        return Written({"r": r}, tensors, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        held = {}
        for module, p in found.items():
            r, (m, n) = len(p[A]), shapes[module]
            held[module] = Held(HiRA(r), {"A": check_shape(module, A, p[A], (r, n)), "B": check_shape(module, B, p[B], (m, r))})
        return held
