"""Every causal architecture of transformers that can be made tiny: planned, loaded with every matrix left dense, its loss and its adapters'
gradients are those of the stock model, and a step stays within the plan; or one sentence refuses it while planning.

    pytest tests/laws/test_architectures.py -s     prints the list
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import finebits as fb
from finebits.build import hosts
from finebits.interop.hf import load_planned
from finebits.interop.planning import Settings, plan_model
from finebits.interop.selecting import Mistake
from finebits.plan.solve import again
from finebits.tasks.base import labelled
from finebits.tasks.causal_lm import CausalLM

WORDS, HIDDEN = 160, 32
PASSING = ("activations", "block inputs", "one block", "masks and positions", "loss chunk", "gradients", "optimizer's work")
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
    "glm glm4 hyperclovax jais2 modernbert-decoder roberta rwkv mamba"
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
REFUSED = {
    "gpt2": ({}, "Conv1D"),
    "openai-gpt": ({}, "Conv1D"),
    "falcon": ({}, "FalconLinear"),
    "trocr": ({}, "not the next-token loss"),
    "xlm": ({}, "not the next-token loss"),
    "cpmant": ({}, "not the next-token loss"),
    "mixtral": (dict(output_router_logits=True), "loss of its routers"),
}


BEYOND = {"roberta": 1.06}  # with dropout, computed again
LOOSE = {"recurrent_gemma": 0.7}  # its blocks keep their last state for themselves, with all that it was computed from


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
        target_modules=r"(?!.*experts$|.*experts\.[a-z_]+$).*",
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MORE)
def test_loss_gradients_and_memory(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder(tmp_path, kind, MORE[kind])
    stock, b = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), batch()
    wanted = stock(**b, use_cache=False).loss
    wanted.backward()
    theirs = {k: p.grad for k, p in stock.named_parameters()}
    plan = plan_model(tmp_path, None, None, settings())
    assert plan.levers.attn_implementation == (stock.config.get_text_config()._attn_implementation or "eager")
    model, _ = load_planned(plan)
    loss = step(model, b)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    for name, host in hosts(model):
        A, B, G = host.p["default"]["A"], host.p["default"]["B"], theirs[f"{name}.weight"]
        got = torch.zeros_like(B) if B.grad is None else B.grad
        torch.testing.assert_close(got, 2.0 * G @ A.T, rtol=1e-3, atol=1e-4 * float(G.norm()), msg=lambda m, name=name: f"{name}: {m}")
        A.grad = B.grad = None
    model.train()
    said = f"{kind:20} {type(model).__name__:28} loss {float(wanted):.4f}"
    for checkpointing in (False, True)[: 1 + model.supports_gradient_checkpointing]:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        plan = again(plan, gradient_checkpointing=checkpointing)
        measured, planned = held(lambda: step(model, b)), sum(v for k, v in plan.memory.items() if k in PASSING)
        model.zero_grad()
        said += f"  {'checkpoints' if checkpointing else 'step'} {measured:>10,} of {planned:>10,} bytes"
        assert LOOSE.get(kind, 0.8) * planned < measured < BEYOND.get(kind, 1.05) * planned, said
    print(said)


@pytest.mark.filterwarnings("ignore")
def test_what_the_model_never_calls_stays_as_it_is(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of dt_proj and never calls it: an adapter there would train nothing."""
    folder(tmp_path, "mamba", {})
    plan = plan_model(tmp_path, None, None, settings(target_modules=["dt_proj", "x_proj", "in_proj"]))
    assert {name.rpartition(".")[2] for name in plan.modules} == {"x_proj", "in_proj"}
    (notice,) = plan.notices
    assert "layers.0.mixer.dt_proj and 1 more" in notice and notice in " ".join(plan.summary().split())
    with pytest.raises(Mistake, match="calls none of the modules that target_modules names"):
        plan_model(tmp_path, None, None, settings(target_modules=["dt_proj"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_one_sentence_of_refusal(kind: str, tmp_path: Path) -> None:
    more, said = REFUSED[kind]
    folder(tmp_path, kind, more)
    with pytest.raises(Mistake, match=said) as caught:
        plan_model(tmp_path, None, None, settings())
    print(f"{kind:20} refused: {caught.value}")
    assert "\n" not in str(caught.value)
