"""MiSS (PEFT: MissConfig): D as miss_block; PEFT tells plain, bat and mini apart by init_weights.

PEFT's update of inputs that r does not divide takes them as if zeros followed, as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.adapters import miss as paper
from finebits.adapters.base import Params
from finebits.peft_forms.base import Form, Held, Written, check_shape, one_of

BLOCK = "miss_block"


@dataclass(frozen=True)
class Miss(Form):
    """One matrix of r columns for every r inputs.

    >>> Miss().write({"q": Held(fb.MiSS(rank=2), {"block": torch.ones(2, 4)})}).settings
    {'r': 2, 'mini_r': 1, 'init_weights': True}
    """

    peft: ClassVar[str] = "MISS"
    adapter: ClassVar[type] = paper.MiSS
    parts: ClassVar[tuple[str, ...]] = (BLOCK,)
    reads: ClassVar[frozenset[str]] = frozenset({"r", "mini_r"})
    starts: ClassVar[tuple[str, tuple[Any, ...]]] = "init_weights", (True, False, None, "bat", "mini")
    dropout: ClassVar[str] = "miss_dropout"

    def write(self, held: Mapping[str, Held]) -> Written:
        rank, mini, bat = one_of([(h.adapter.rank, h.adapter.mini or 0, h.adapter.bat) for h in held.values()], "(rank, mini, bat)", "MISS")
        settings = {"r": rank, "mini_r": mini or 1, "init_weights": "bat" if bat else "mini" if mini else True}
        return Written(settings, {module: {BLOCK: h.p["block"]} for module, h in held.items()}, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        kind = settings.get("init_weights")
        adapter = paper.MiSS(int(settings["r"]), int(settings["mini_r"]) if kind == "mini" else None, kind == "bat")
        blocks = {module: check_shape(module, BLOCK, p[BLOCK], adapter.shapes(*shapes[module])["block"]) for module, p in found.items()}
        return {module: Held(adapter, {"block": block}) for module, block in blocks.items()}
