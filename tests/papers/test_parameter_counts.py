"""Trained numbers as others have published them, from shapes alone.

The first are of PEFT's public comparison of methods on Llama-3.2-3B (`method_comparison/MetaMathQA`), where query and value are adapted if no
more is said. One line a figure: the adapter, the model, the modules, the count.
"""

from __future__ import annotations

from typing import Any

import pytest

import finebits as fb
from finebits.plan import cost

Shapes = dict[str, tuple[int, int]]


def decoder(hidden: int, kv: int, inner: int) -> Shapes:
    """(out, in) of a Llama block's linears."""
    attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    return attention | {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}


MODELS: dict[str, tuple[int, Shapes]] = {
    "Llama-3.2-3B": (28, decoder(3072, 1024, 8192)),
    "LLaMA-2-7B": (32, decoder(4096, 4096, 11008)),
    "Mistral-7B": (32, decoder(4096, 1024, 14336)),
    "RoBERTa-base": (12, {"q": (768, 768), "v": (768, 768)}),
}
QV, ALL = "q v", "q k v o gate up down"
PUBLISHED: list[tuple[Any, str, str, int]] = [
    (fb.LoRA(rank=32), "Llama-3.2-3B", QV, 9_175_040),
    (fb.LoRA(rank=64), "Llama-3.2-3B", QV, 18_350_080),
    (fb.LoRAFA(rank=32), "Llama-3.2-3B", QV, 3_670_016),
    (fb.Gated(rank=64), "Llama-3.2-3B", QV, 18_353_664),  # AdaLoRA at its initial rank
    (fb.RandLoRA(basis=32), "Llama-3.2-3B", QV, 9_289_728),
    (fb.VeRA(rank=256), "Llama-3.2-3B", QV, 129_024),
    (fb.LoRAXS(rank=96), "Llama-3.2-3B", ALL, 1_806_336),  # LoRA-SB
    (fb.LoRAXS(rank=96), "Mistral-7B", ALL, 2_064_384),
    (fb.LoRA(rank=128), "LLaMA-2-7B", ALL, 319_815_680),
    (fb.SLoRA(rank=128, train="core"), "LLaMA-2-7B", ALL, 3_670_016),  # IntTune
    (fb.LoRA(rank=8), "RoBERTa-base", QV, 294_912),
]


@pytest.mark.parametrize(("adapter", "model", "modules", "count"), PUBLISHED, ids=lambda v: None if isinstance(v, int) else str(v))
def test_trained_numbers_are_those_that_were_published(adapter: Any, model: str, modules: str, count: int) -> None:
    layers, shapes = MODELS[model]
    trained, _ = cost.together((adapter, shapes[name]) for name in modules.split() for _ in range(layers))
    assert trained == count
