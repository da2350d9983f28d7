"""Bias tuning: vectors alone lower the divergence, and what they have become is saved, loaded and exported."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama
from finebits import store
from finebits.build import tuned, vectors

KIND = {"attention_bias": True, "mlp_bias": True}
TUNING = fb.BiasTuning(epochs=4, lr=1e-2)


def run(model: Any, batch: Any) -> torch.Tensor:
    return model.base_model(input_ids=batch, use_cache=False)[0]


def text(seed: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (4, 24), generator=gen) for _ in range(8)]


def divergence(model: Any, dtype: torch.dtype) -> float:
    """KL from the unquantized model on other text."""
    full = tiny_llama.fresh(dtype=dtype, **KIND)
    with torch.no_grad():
        each = [[m(input_ids=ids).logits.float().log_softmax(-1) for m in (full, model)] for ids in text(9)]
    return float(sum((p.exp() * (p - q)).sum(-1).mean() for p, q in each) / len(each))


@functools.cache
def swept(dtype: str, refine: tuple = (TUNING,)) -> Any:
    model = tiny_llama.fresh(dtype=getattr(torch, dtype), **KIND)
    plan = tiny_llama.plan(format=fb.Int(3, block=32, symmetric=False), init=fb.Zeros(), dtype=dtype)
    return fb.sweep(model, plan, text(3), run, refine=refine, head=model.lm_head)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_alone_lower_the_divergence_and_every_weight_stays(dtype: str) -> None:
    plain, model = swept(dtype, ()), swept(dtype)
    assert divergence(model, getattr(torch, dtype)) < 0.95 * divergence(plain, getattr(torch, dtype))
    before = plain.state_dict()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == set(tuned(model)) and moved <= set(vectors(model)) and any(k.endswith("bias") for k in moved)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, p in plain.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters()) and not tuned(plain)


def test_it_is_saved_and_loaded_and_saved_again(tmp_path: Path) -> None:
    model = swept("float32")
    fb.save(model, tmp_path / "a")
    back = store.apply(tiny_llama.fresh(**KIND), store.read(tmp_path / "a"))
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())
    fb.save(back, tmp_path / "b")
    files = {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()}
    assert store.TUNED in files and files == {f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()}


def test_it_compares_what_the_head_makes() -> None:
    with pytest.raises(ValueError, match="BiasTuning compares what the head makes"):
        model = tiny_llama.fresh()
        fb.sweep(model, tiny_llama.plan(), text(3)[:1], run, refine=(TUNING,))
