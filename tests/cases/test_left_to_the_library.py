"""`attn_implementation: auto` is what transformers picks by itself, for models that have no sdpa too.

Public report of the kind: an attention that is forced upon a model which refuses it (EleutherAI/sparsify issue 1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import finebits as fb
from finebits.interop.planning import Settings, plan_model
from finebits.interop.selecting import Mistake

SIZES: dict[str, Any] = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    num_local_experts=2, num_experts_per_tok=1,
)  # fmt: skip


def plan(folder: Path, kind: str, **more: Any) -> Any:
    import transformers

    getattr(transformers, f"{kind}Config")(**SIZES).save_pretrained(folder)
    given: dict[str, Any] = dict(formats=(fb.NF(4, 32),), dtype="float32", target_modules=["q_proj", "v_proj"], max_length=64)
    return plan_model(folder, None, None, Settings(**given | more), fast=True)


@pytest.mark.parametrize(("kind", "always"), [("Gemma2", None), ("GptOss", "eager"), ("Llama", "sdpa")])
def test_auto_is_what_transformers_picks(kind: str, always: str | None, tmp_path: Path) -> None:
    made = plan(tmp_path, kind)
    with torch.device("meta"):
        picked = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).config._attn_implementation
    assert made.levers.attn_implementation == picked == (always or picked)  # Gemma 2's has changed between versions
    assert made.peak == plan(tmp_path, kind, attn_implementation=picked).peak
    if picked == "sdpa":
        assert made.peak < plan(tmp_path, kind, attn_implementation="eager").peak


def test_an_attention_that_a_model_refuses_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"attn_implementation is sdpa, and transformers has none such for gpt_oss: take auto"):
        plan(tmp_path, "GptOss", attn_implementation="sdpa")
