"""What is read of a checkpoint is what transformers' from_pretrained loads: every parameter and buffer, whatever names the files have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import finebits as fb
from finebits.build import build
from finebits.export._safetensors import describe_model, merged_entries, model_files
from finebits.interop.checkpoint import Tensors, Unreadable, persistent
from finebits.interop.hf import fill, skeleton
from finebits.interop.linears import linearized

SIZES = {
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("head_dim", "rotary_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "state_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    "num_key_value_heads": 2,
}
KINDS = (
    "llama mistral qwen2 qwen3 qwen3_moe mixtral deepseek_v3 deepseek_v2 gemma gemma2 gemma3_text granite granitemoe cohere cohere2 phi phi3 "
    "gptj gpt_neox gpt2 bloom opt stablelm olmo2 olmoe mpt recurrent_gemma mamba starcoder2 codegen gpt_oss glm4_moe falcon_h1 lfm2 jamba"
).split()


def tiny(kind: str, path: Path, **more: Any) -> Any:
    """A random model of an architecture, saved: under the names of published checkpoints, which transformers restores."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    cls = CONFIG_MAPPING[kind]
    known = cls()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(cls(**{k: v for k, v in SIZES.items() if hasattr(known, k)} | more))
    for p in model.parameters():
        torch.nn.init.normal_(p)
    model.save_pretrained(path)
    return model


def same(folder: Path, dtype: torch.dtype) -> Tensors:
    """Compare with from_pretrained, tensor by tensor and as a filled model, bit by bit."""
    from transformers import AutoModelForCausalLM

    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tensors, exact = Tensors(folder), Tensors(folder, stock=True)
    for name, held in [*stock.named_parameters(remove_duplicate=False), *persistent(stock).items()]:
        assert torch.equal(exact[name].to(held.dtype), held), name
    filled = skeleton(folder, dtype, stock.config._attn_implementation)
    fill(filled, tensors, dtype)
    assert tensors.keys() >= dict(filled.named_parameters()).keys()
    linears = (filled, linearized(stock))
    ours, theirs = (dict([*m.named_parameters(remove_duplicate=False), *m.named_buffers()]) for m in linears)
    assert ours.keys() == theirs.keys()
    for name, held in theirs.items():
        assert ours[name].dtype == held.dtype and torch.equal(ours[name], held), name
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_from_pretraineds(kind: str, tmp_path: Path) -> None:
    tiny(kind, tmp_path)
    same(tmp_path, torch.bfloat16)


def rename(folder: Path, new: Callable[[str], str | None]) -> None:
    """Save the tensors again under other names, those without one left out."""
    held = load_file(folder / "model.safetensors")
    save_file({n: v for k, v in held.items() if (n := new(k))}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("how", ["without the prefix", "with it everywhere"])
def test_prefixes_are_added_and_taken_off(kind: str, how: str, tmp_path: Path) -> None:
    prefix = tiny(kind, tmp_path).base_model_prefix + "."
    rename(tmp_path, (lambda k: k.removeprefix(prefix)) if how == "without the prefix" else (lambda k: prefix + k.removeprefix(prefix)))
    same(tmp_path, torch.float32)


def test_the_name_of_an_older_release(tmp_path: Path) -> None:
    tiny("gpt_neox", tmp_path)
    rename(tmp_path, lambda k: k.replace("lm_head", "embed_out"))
    same(tmp_path, torch.float32)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "opt"])
def test_a_base_model_without_a_head_is_tied(kind: str, tmp_path: Path) -> None:
    tiny(kind, tmp_path, tie_word_embeddings=True).base_model.save_pretrained(tmp_path)
    same(tmp_path, torch.float32)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both", "both, and they differ"])
def test_tied_tensors_under_either_name(kept: str, tmp_path: Path) -> None:
    tiny("llama", tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    table = held.pop("model.embed_tokens.weight")
    held |= {k: table.clone() for k in ("model.embed_tokens.weight", "lm_head.weight") if kept.startswith("both") or k == kept}
    if kept.endswith("differ"):
        held["lm_head.weight"] += 1
    save_file(held, file, metadata={"format": "pt"})
    tensors = same(tmp_path, torch.float32)
    assert bool(tensors.notices) == kept.endswith("differ")
    model: Any = skeleton(tmp_path, torch.float32)
    model.tie_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) != kept.endswith("differ")


def test_what_the_model_has_no_place_for_is_said_and_left_out(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.layers.7.mlp.up_proj.weight": torch.ones(4, 4)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    (notice,) = same(tmp_path, torch.float32).notices
    assert "1 tensors" in notice and "model.layers.7.mlp.up_proj.weight" in notice


def test_what_the_files_lack_is_refused(tmp_path: Path) -> None:
    tiny("llama", tmp_path).base_model.save_pretrained(tmp_path)
    with pytest.raises(Unreadable, match="has no tensor lm_head.weight, which LlamaForCausalLM needs"):
        Tensors(tmp_path)
    rename(tmp_path, lambda k: None if "layers.1.mlp" in k else k)
    with pytest.raises(Unreadable, match=r"has no tensor model.layers.1.mlp.gate_proj.weight \(nor 3 others\)"):
        Tensors(tmp_path)
    shutil.rmtree(tmp_path)
    tiny("llama", tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 64')
    )
    with pytest.raises(Unreadable, match=r"is \(32, 48\) in the checkpoint, and config.json asks for \(32, 64\)"):
        Tensors(tmp_path)


def test_a_routers_buffer_is_loaded_and_exported_as_it_is(tmp_path: Path) -> None:
    """Experts are saved one by one and fused when they are loaded; the router's bias is a float32 buffer in a bfloat16 model."""
    tiny("deepseek_v3", tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    held = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in held.items() if k != name}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert Tensors(tmp_path).notices == [f"the checkpoint has no buffer {name} (1 in all): it is what it is in a new DeepseekV3ForCausalLM"]
    held[name] = torch.randn(4)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    plan = fb.Plan({"model.layers.0.self_attn.o_proj": fb.Spec()}, model=str(tmp_path), levers=fb.Levers(dtype="bfloat16"))
    model: Any = skeleton(tmp_path, torch.bfloat16)
    fill(model, Tensors(tmp_path), torch.bfloat16)
    build(model, plan)
    describe_model(model, tmp_path / "out", torch.bfloat16)
    for path, file in model_files(merged_entries(model, torch.bfloat16)).items():
        file.write(tmp_path / "out" / path)
    assert torch.equal(same(tmp_path / "out", torch.bfloat16)[name], held[name])
