"""Held in bf16, computed in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_llama as tiny
from finebits.arithmetic import compute_in, dtypes, native_bf16
from finebits.build import hosts

BLOCKS = ("model.layers.0", "model.layers.1")


@pytest.mark.parametrize("format", ["nf2", None])
def test_blocks_compute_in_float32_and_hand_on_bf16(format: Any) -> None:
    """As near to the same weights in float32 as states that are rounded between blocks can be, and nearer than bf16 arithmetic."""
    low = tiny.tuned(tiny.plan(format=format, dtype="bfloat16"))
    exact = tiny.tuned(tiny.plan(format=format, dtype="bfloat16")).float()
    with torch.no_grad():
        for (_, a), (_, b) in zip(hosts(low), hosts(exact), strict=True):
            b.weight = torch.nn.Parameter((a.weight.dequantize() if format else a.weight).float(), requires_grad=False)
    right, plain = tiny.logits(exact), tiny.logits(low).float()
    made = tiny.logits(compute_in(low, BLOCKS, torch.float32)).float()
    scale = right.abs().max()
    assert (made - right).abs().max() < 0.02 * scale
    assert (made - right).square().mean() < (plain - right).square().mean()
    assert low.model.layers[0].input_layernorm.weight.dtype == torch.float32 and low.model.embed_tokens.weight.dtype == torch.bfloat16


def test_gradients_pass_and_what_a_block_is_given_is_bf16() -> None:
    """That is what checkpointing keeps."""
    model = compute_in(tiny.tuned(tiny.plan(dtype="bfloat16")), BLOCKS, torch.float32).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    given: list[torch.dtype] = []
    for name in BLOCKS:
        model.get_submodule(name).register_forward_pre_hook(lambda m, x: given.append(x[0].dtype), prepend=True)
    model(**tiny.batches(3)[0], use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, h in hosts(model) for p in h.p.parameters())
    assert given and set(given) == {torch.bfloat16}


@pytest.mark.parametrize("cap", [{"ATEN_CPU_CAPABILITY": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}])
def test_a_cap_on_torch_counts(cap: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in cap.items():
        monkeypatch.setenv(key, value)
    assert not native_bf16()
    assert dtypes("auto", "cpu") == dtypes("bfloat16", "cpu") == ("bfloat16", "float32")
    assert dtypes("float32", "cpu") == ("float32", "float32") and dtypes("auto", "cuda") == ("bfloat16", "bfloat16")
