"""OFT and OFTv2 (PEFT: OFTConfig): the numbers above the diagonals as oft_R; block, series or exact transform, one rotation for all or not.

PEFT's exact transform is of −Q, its series of Q; a series of three terms is summed there as one of four. PEFT takes a smaller block where its
own does not divide the inputs, which the tensors tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finebits.adapters import oft as paper
from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.peft_forms.base import Form, Held, Written, check_shape, one_of

R = "oft_R.weight"


@dataclass(frozen=True)
class OFT(Form):
    """W Rᵀ.

    >>> OFT().write({"q": Held(fb.OFT(block=4, terms=0), {"R": torch.ones(2, 6)})}).settings
    {'r': 0, 'oft_block_size': 4, 'block_share': False, 'use_cayley_neumann': False, 'num_cayley_neumann_terms': 5}
    """

    peft: ClassVar[str] = "OFT"
    adapter: ClassVar[type] = paper.OFT
    parts: ClassVar[tuple[str, ...]] = (R,)
    reads: ClassVar[frozenset[str]] = frozenset("r oft_block_size block_share use_cayley_neumann num_cayley_neumann_terms".split())
    idle: ClassVar[frozenset[str]] = frozenset({"eps"})  # of COFT
    dropout: ClassVar[str] = ""

    def write(self, held: Mapping[str, Held]) -> Written:
        adapter = one_of([h.adapter for h in held.values()], "block and series", "OFT")
        settings = {"r": 0, "oft_block_size": adapter.block, "block_share": adapter.alike, "use_cayley_neumann": adapter.terms > 0}
        settings["num_cayley_neumann_terms"] = adapter.terms or 5
        sign = 1 if adapter.terms else -1
        return Written(settings, {module: {R: sign * h.p["R"]} for module, h in held.items()}, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        terms = int(settings.get("num_cayley_neumann_terms", 5)) if settings.get("use_cayley_neumann", True) else 0
        if 0 < terms < 3:
            raise Invalid(f"num_cayley_neumann_terms is {terms} in adapter_config.json, which is no rotation: merge it with peft")
        held = {}
        for module, p in found.items():
            block = (1 + math.isqrt(1 + 8 * p[R].shape[1])) // 2
            adapter = paper.OFT(block, max(terms, 4) if terms else 0, bool(settings.get("block_share")))
            t = check_shape(module, R, p[R], adapter.shapes(*shapes[module])["R"])
            held[module] = Held(adapter, {"R": t if terms else -t})
        return held
