"""VeRA (PEFT: VeraConfig): d and b as vera_lambda_d and vera_lambda_b; A and B of a module are the corners, as large as its weight, of one
vera_A and one vera_B.

Here weights of one shape have a pair of their own. Pairs that are corners of one are written as that; others side by side in a pair of as many
directions as they have together, of which d opens the module's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from finebits.adapters import vera as paper
from finebits.adapters.base import Params
from finebits.peft_forms.base import Form, Held, Written, check_shape, projections, spread

D, B = "vera_lambda_d", "vera_lambda_b"
COMMON = ("base_model.vera_A", "base_model.vera_B")


@dataclass(frozen=True)
class Vera(Form):
    """diag(b) B diag(d) A.

    >>> p = {"A": torch.ones(1, 2), "B": torch.ones(2, 1), "d": torch.ones(1), "b": torch.ones(2)}
    >>> Vera().write({"q": Held(fb.VeRA(rank=1), p)}).settings
    {'r': 1, 'save_projection': True}
    """

    peft: ClassVar[str] = "VERA"
    adapter: ClassVar[type] = paper.VeRA
    parts: ClassVar[tuple[str, ...]] = (D, B)
    common: ClassVar[tuple[str, ...]] = COMMON
    reads: ClassVar[frozenset[str]] = frozenset({"r", "save_projection"})
    idle: ClassVar[frozenset[str]] = frozenset({"projection_prng_key", "d_initial"})
    dropout: ClassVar[str] = "vera_dropout"

    def write(self, held: Mapping[str, Held]) -> Written:
        pairs = {_which(h.p): (h.p["A"], h.p["B"]) for h in held.values()}
        A, Bs = (spread([pair[i] for pair in pairs.values()]) for i in (0, 1))
        at = dict.fromkeys(pairs, 0)  # where the directions of a pair begin
        if A is None or Bs is None:
            whole, at = 0, {}
            for which, (own, _) in pairs.items():
                at[which], whole = whole, whole + len(own)
            A = torch.zeros(whole, max(own.shape[1] for own, _ in pairs.values()))
            Bs = torch.zeros(max(len(own) for _, own in pairs.values()), whole)
            for which, (own_A, own_B) in pairs.items():
                rows = slice(at[which], at[which] + len(own_A))
                A[rows, : own_A.shape[1]], Bs[: len(own_B), rows] = own_A, own_B
        tensors = {}
        for module, (_, p, _) in held.items():
            before = at[_which(p)]
            tensors[module] = {D: pad(p["d"], (before, len(A) - before - len(p["d"]))), B: p["b"]}
        return Written({"r": len(A), "save_projection": True}, tensors, dict(zip(COMMON, (A, Bs), strict=True)))

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        A, Bs = projections(self, settings, common)
        r, held, corners = int(settings["r"]), {}, dict[Any, tuple[Tensor, Tensor]]()
        for module, p in found.items():
            m, n = shapes[module]
            own = corners.setdefault((m, n), (A[:, :n], Bs[:m]))
            d, b = check_shape(module, D, p[D], (r,)), check_shape(module, B, p[B], (m,))
            held[module] = Held(paper.VeRA(r), {"A": own[0], "B": own[1], "d": d, "b": b})
        return held


def _which(p: Params) -> tuple[int, int]:
    """Of whose A and B are these? Hosts that hold them together have the same."""
    return p["A"].data_ptr(), p["B"].data_ptr()
