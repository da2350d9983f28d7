"""Trainable tokens (PEFT: TrainableTokensConfig): T as trainable_tokens_delta, which holds the rows themselves, in the order of token_indices.

Beside a LoRA they are PEFT's `trainable_token_indices` (finebits.peft_forms.base.tokens_of).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from finebits.adapters import trainable_tokens as paper
from finebits.adapters.base import Params
from finebits.peft_forms.base import Form, Held, Written, check_shape, one_of

ROWS = "trainable_tokens_delta"


@dataclass(frozen=True)
class TrainableTokens(Form):
    """Some rows of a table.

    >>> TrainableTokens().write({"words": Held(fb.TrainableTokens((3, 7)), {"tokens": torch.ones(2, 4)})}).settings
    {'token_indices': [3, 7]}
    """

    peft: ClassVar[str] = "TRAINABLE_TOKENS"
    adapter: ClassVar[type] = paper.TrainableTokens
    parts: ClassVar[tuple[str, ...]] = (ROWS,)
    reads: ClassVar[frozenset[str]] = frozenset({"token_indices"})
    dropout: ClassVar[str] = ""

    def write(self, held: Mapping[str, Held]) -> Written:
        indices = one_of((h.adapter.indices for h in held.values()), "choice of words", self.peft)
        return Written({"token_indices": list(indices)}, {module: {ROWS: h.p["tokens"]} for module, h in held.items()}, {})

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        return {module: rows(module, settings["token_indices"], p[ROWS], shapes[module]) for module, p in found.items()}


def rows(module: str, indices: list[int], T: Tensor, shape: tuple[int, int]) -> Held:
    """Rows in any order, as an adapter has them.

    >>> rows("words", [7, 3], torch.tensor([[1.0], [2.0]]), (8, 1)).p["tokens"]
    tensor([[2.],
            [1.]])
    """
    adapter = paper.TrainableTokens(tuple(indices))
    T = check_shape(module, ROWS, T, adapter.shapes(*shape)["tokens"])
    return Held(adapter, {"tokens": T[sorted(range(len(indices)), key=indices.__getitem__)]})
