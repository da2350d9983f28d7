"""Tiny models of every architecture of transformers, as folders, and what they are trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import finebits as fb
from finebits.interop.planning import Settings
from finebits.tasks.base import labelled
from finebits.tasks.causal_lm import CausalLM

WORDS, HIDDEN = 160, 32
PASSING = (
    "activations",
    "block inputs",
    "one block",
    "masks and positions",
    "loss chunk",
    "gradients",
    "optimizer's work",
)  # terms of a plan that come and go in a step
SIZES: dict[str, Any] = dict(
    vocab_size=WORDS, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.15, init_std=0.15,
    hidden_size=HIDDEN, n_embd=HIDDEN, d_model=HIDDEN, word_embed_proj_dim=HIDDEN, lru_width=HIDDEN, num_hidden_layers=2, n_layer=2, n_layers=2,
    intermediate_size=48, ffn_dim=48, n_inner=48, num_attention_heads=4, n_head=4, n_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, n_positions=128, n_ctx=128, max_seq_len=128, rotary_dim=4, sliding_window=16, attention_window_size=16,
    num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
)  # fmt: skip
HEADS = dict(head_dim=8)
LATENT = dict(num_key_value_heads=4)
PLAIN = (
    "apertus arcee bloom codegen ctrl cwm diffllama ernie4_5 exaone4 gpt_bigcode gpt_neox gpt_neox_japanese gptj llama ministral3 "
    "mistral moshi mpt nemotron olmo olmo2 olmo3 opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 xglm biogpt bitnet "
    "glm glm4 hyperclovax jais2 modernbert-decoder roberta rwkv mamba falcon gpt2 openai-gpt"
)
MORE: dict[str, dict[str, Any]] = dict.fromkeys(PLAIN.split(), {}) | {
    # heads that do more than multiply
    "gemma": HEADS,
    "helium": HEADS,
    "gemma2": HEADS | dict(query_pre_attn_scalar=8, final_logit_softcapping=3.0),
    "gemma3_text": HEADS | dict(query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    "vaultgemma": HEADS | dict(query_pre_attn_scalar=8),
    "nanochat": {},
    "granite": dict(logits_scaling=8.0),
    "granitemoe": dict(logits_scaling=4.0),
    "cohere": dict(logit_scale=0.5),
    "cohere2": {},
    "minicpm3": LATENT | dict(dim_model_base=8),
    "opt": dict(word_embed_proj_dim=16),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "gemma4_text": HEADS | dict(global_head_dim=8, layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0),
    # experts
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": HEADS,
    "olmoe": {},
    "phimoe": {},
    "gpt_oss": HEADS,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe": {},
    "llama4_text": HEADS,
    "ernie4_5_moe": {},
}

ALIKE = frozenset(  # to finebits like another that is in the list: tried where `every` test is
    "apertus arcee biogpt bitnet cohere cwm deepseek_v3 ernie4_5 ernie4_5_moe exaone4 gemma gemma3_text glm glm4 glm4_moe gpt_bigcode "
    "gpt_neox_japanese gptj granitemoe helium hyperclovax jais2 ministral3 mistral mpt nanochat nemotron olmo olmo2 olmoe openai-gpt "
    "persimmon phimoe qwen2 qwen2_moe qwen3 qwen3_moe roberta rwkv seed_oss smollm3 stablelm starcoder2 vaultgemma xglm".split()
)


def tiny(kind: str, more: dict[str, Any]) -> Any:
    """A model of this kind with random biases, norms and weights large enough that a wrong one shows."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    default = made()
    given = {k: v for k, v in SIZES.items() if hasattr(default, k)}
    given = {k: v for k, v in given.items() if k not in made.attribute_map or made.attribute_map[k] not in given}
    if vars(default).get("layer_types"):
        given["layer_types"] = default.layer_types[:2]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made(**given | more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape))
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, WORDS, (2, 64), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where((mask == 1) & (torch.arange(64) > 20), ids, -100)}


def settings(**more: Any) -> Settings:
    given: dict[str, Any] = dict(formats=(None,), adapter=fb.LoRA(rank=2, alpha=4.0), init=fb.Zeros(), objective="weight", dtype="float32")
    given |= dict(
        gradient_checkpointing=False,
        target_modules=r"(?!.*experts$|.*experts\.[a-z_]+$|.*(emb|wte|wpe)[a-z_]*$).*",  # no tables of embeddings
        max_length=64,
        per_device_train_batch_size=2,
        loss_chunk=16,
    )
    return Settings(**given | more)


def folder(path: Path, kind: str, more: dict[str, Any]) -> Path:
    """That model saved, with a tokenizer of one word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny(kind, more).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a").save_pretrained(path)
    return path


def step(model: Any, b: dict[str, Tensor]) -> Tensor:
    loss = CausalLM().loss(model, b, 16) / labelled(b, CausalLM())
    loss.backward()
    return loss.detach()


def held(run: Any) -> int:
    """The most bytes that torch holds at a time while this runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    now = most = 0
    for e in sorted((e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most
