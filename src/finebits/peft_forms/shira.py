"""SHiRA (PEFT: ShiraConfig): values as shira_weight, their places as (row, column) pairs in shira_indices, r (m + n) of them in every module.

PEFT orders them by row and column, as here; a file in another order is read all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from finebits.adapters import sparse as paper
from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.peft_forms.base import Form, Held, Written, check_shape, one_of

VALUES, PLACES = "shira_weight", "shira_indices"


@dataclass(frozen=True)
class Shira(Form):
    """Entries of a weight.

    >>> p = {"delta": torch.ones(4), "index": torch.tensor([0, 1, 2, 3])}
    >>> Shira().write({"q": Held(fb.Sparse(rank=1), p, (2, 2))}).tensors["q"]["shira_indices"]
    tensor([[0, 0, 1, 1],
            [0, 1, 0, 1]], dtype=torch.int32)
    """

    peft: ClassVar[str] = "SHIRA"
    adapter: ClassVar[type] = paper.Sparse
    parts: ClassVar[tuple[str, ...]] = (VALUES, PLACES)
    reads: ClassVar[frozenset[str]] = frozenset({"r"})
    idle: ClassVar[frozenset[str]] = frozenset({"mask_type", "random_seed"})
    dropout: ClassVar[str] = ""

    def write(self, held: Mapping[str, Held]) -> Written:
        if odd := next((module for module, h in held.items() if h.adapter.part != "entries"), None):
            raise Invalid(
                f"{odd} has {held[odd].adapter.part} of its weight, and PEFT's SHIRA single entries: export target adapter writes a LoRA"
            )
        rank = one_of([h.adapter.rank for h in held.values()], "r", "SHIRA")
        tensors = {module: {VALUES: h.p["delta"], PLACES: _pairs(h.p["index"], module, h, rank)} for module, h in held.items()}
        return Written({"r": rank, "mask_type": "random"}, tensors, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        held, adapter = {}, paper.Sparse("entries", rank=int(settings["r"]))
        for module, p in found.items():
            n, many = shapes[module][1], adapter.shapes(*shapes[module])["delta"][0]
            rows, columns = check_shape(module, PLACES, p[PLACES], (2, many)).long()
            index, order = (rows * n + columns).sort()
            held[module] = Held(adapter, {"delta": check_shape(module, VALUES, p[VALUES], (many,))[order], "index": index.int()})
        return held


def _pairs(index: Tensor, module: str, held: Held, rank: int) -> Tensor:
    m, n = held.shape
    if len(index) != rank * (m + n):
        raise Invalid(f"{module} has all {m * n} entries, and PEFT's SHIRA wants {rank} ({m} + {n}) of them: export target merged")
    return torch.stack([index // n, index % n]).int()
