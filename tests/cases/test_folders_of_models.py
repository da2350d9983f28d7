"""Folders that people have: what transformers loads of them is what is planned and trained, or one sentence says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatty
import finebits as fb
from finebits.init.zeros import Zeros
from finebits.interop.checkpoint import Tensors, Unreadable, config_of, fingerprint
from finebits.interop.hf import folder_of, load_planned
from finebits.interop.planning import Settings, plan_model
from tiny_llama import fresh, logits, worded

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def ours(folder: Path) -> torch.Tensor:
    """Logits of the planned and loaded model with every matrix left dense: any difference from stock is a fault and no rounding."""
    given = Settings(
        formats=(fb.NF(4, block=32),), init=Zeros(), objective="weight", dtype="float32", max_length=16, overrides={".*": None}
    )
    return logits(load_planned(plan_model(folder, None, None, given))[0])


def stock(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def sharded(folder: Path, **more: Any) -> Path:
    worded(folder, **more)
    (folder / FILE).unlink()
    fresh(**more).save_pretrained(folder, max_shard_size="60KB")
    return folder


def held(folder: Path, change: Any) -> None:
    save_file(change(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_beside_scales_are_not_read_as_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """unslothai/unsloth#6978: float8 and int8 checkpoints whose scales were ignored."""
    right = stock(worded(tmp_path))
    top, end = (448, "_scale_inv") if dtype == torch.float8_e4m3fn else (127, "_scale")

    def codes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scale = {k: v.abs().max() / top for k, v in tensors.items() if "proj" in k}
        q = {k: (v / scale[k] if dtype.is_floating_point else (v / scale[k]).round()).to(dtype) for k, v in tensors.items() if k in scale}
        return tensors | q | {k + end: s.reshape(1, 1) for k, s in scale.items()}

    held(tmp_path, codes)
    assert float((ours(tmp_path) - right).abs().max() / right.abs().max()) < 0.3  # the codes' own rounding
    held(tmp_path, lambda t: {k: v for k, v in t.items() if not k.endswith(end)})
    with pytest.raises(Unreadable, match="codes of an unknown layout are not read as weights"):
        ours(tmp_path)


def test_a_scale_beside_a_weight_that_is_no_code_is_refused(tmp_path: Path) -> None:
    worded(tmp_path)
    held(tmp_path, lambda t: t | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)})
    with pytest.raises(Unreadable, match="lies beside a weight as if it were its scale"):
        ours(tmp_path)


def test_the_single_file_counts_and_not_an_older_index(tmp_path: Path) -> None:
    """huggingface/diffusers#14719: model.safetensors beside an older shard index."""
    sharded(tmp_path)
    before = fingerprint(tmp_path)
    fresh(seed=1).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / FILE, tmp_path)
    assert torch.equal(ours(tmp_path), stock(tmp_path)) and torch.equal(stock(tmp_path), stock(tmp_path / "new"))
    after = fingerprint(tmp_path)
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()  # nothing reads them
    assert before != after == fingerprint(tmp_path)


def test_the_head_alone_stands_for_tied_embeddings(tmp_path: Path) -> None:
    """huggingface/transformers#38870: safetensors keeps one of two tied names."""
    right = logits(fresh(tie_word_embeddings=True))
    worded(tmp_path, tie_word_embeddings=True)
    held(tmp_path, lambda t: {k.replace("model.embed_tokens", "lm_head"): v for k, v in t.items()})
    assert torch.equal(ours(tmp_path), right) and torch.equal(stock(tmp_path), right)


def test_a_model_whose_config_names_its_file(tmp_path: Path) -> None:
    worded(tmp_path)
    fresh(seed=1).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / FILE, tmp_path / "other.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(ours(tmp_path), stock(tmp_path)) and torch.equal(stock(tmp_path), stock(tmp_path / "new"))


def test_shards_hold_what_their_index_forgot(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert torch.equal(ours(tmp_path), stock(tmp_path))


def test_files_of_other_tools_and_mixed_dtypes_beside_the_model(tmp_path: Path) -> None:
    sharded(tmp_path, dtype=torch.float16)
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    save_file({k: v.float() * 1.0001 for k, v in load_file(first).items()}, first, metadata={"format": "pt"})
    one = fingerprint(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"of another loader")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert torch.equal(ours(tmp_path), stock(tmp_path)) and fingerprint(tmp_path) == one


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(Unreadable, match=f"names {shard.name}, and the file is missing"):
        Tensors(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(Unreadable, match="is no index of weight files"):
        Tensors(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(Unreadable, match="lies outside of the folder"):
        Tensors(tmp_path)
    (tmp_path / INDEX).unlink()
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    for name, said in (
        ("consolidated.safetensors", "transformers does not load consolidated.safetensors either"),
        ("model.fp16.safetensors", "transformers does not load model.fp16.safetensors either"),
        ("model.Q4_0.gguf", "give .*model.Q4_0.gguf itself"),
        ("pytorch_model.bin", "pytorch_model.bin is a pickle, which finebits does not open"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(Unreadable, match=said):
            Tensors(tmp_path)
        (tmp_path / name).unlink()


def test_an_adapter_beside_or_in_the_place_of_a_model_is_refused(tmp_path: Path) -> None:
    worded(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(Unreadable, match="holds an adapter beside its model"):
        Tensors(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="this is an adapter of x: name that model"):
        folder_of(tmp_path)


def test_the_command_ends_with_code_2_and_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finebits.cli import main

    worded(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"quantization_config": {"quant_method": "aqlm"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "r.yaml").write_text("model: {model_name_or_path: m}\nquantization: {objective: weight}\n")
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--fast"]):
        assert main(["plan", "r.yaml", *more]) == 2
        assert "quantized with aqlm, which is not read here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "no-such"}, "makes no model with this transformers"),
        ({"num_hidden_layers": "2"}, "makes no model .*num_hidden_layers"),
        ({"num_attention_heads": 5}, "makes no model"),
        ({"hidden_act": "no-such"}, "makes no model .*no-such"),
        ({"dtype": "no-such"}, "makes no model .*no-such"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "no such model is for causal_lm"),
    ],
)
def test_a_config_that_makes_no_model(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """Whatever a class of transformers checks, and however it fails."""
    file = chatty.model(tmp_path / "m") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(Unreadable, match=says):
        Tensors(file.parent)


@pytest.mark.parametrize("dtype", ["auto", "torch.bfloat16", "float8_e4m3fn"])
def test_the_dtype_of_a_config_is_not_what_is_computed_in(tmp_path: Path, dtype: str) -> None:
    """from_pretrained(dtype=torch.float32) minds none of these."""
    file = worded(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": dtype}))
    model = load_planned(fb.Plan({}, model=str(tmp_path)))[0]
    assert torch.equal(logits(model), stock(tmp_path))


@pytest.mark.parametrize("name", [FILE, "config.json", "tokenizer.json"])
def test_what_git_lfs_left_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    (worded(tmp_path) / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS in the place of a file: fetch .*git lfs pull"):
        load_planned(fb.Plan({}, model=str(tmp_path)))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, name: str) -> None:
    """Left dense it would make every loss NaN, for which the learning rate would be blamed."""
    held(worded(tmp_path), lambda tensors: tensors | {name: tensors[name].index_fill(0, torch.tensor([3]), torch.inf)})
    with pytest.raises(ValueError, match=f"{name} holds inf at .3.*: a weight with NaN or Inf gives no number back; check the checkpoint"):
        load_planned(fb.Plan({}, model=str(tmp_path)))


def test_a_plan_by_hand_leaves_the_attention_to_transformers(tmp_path: Path) -> None:
    """EleutherAI/sparsify#1: Gemma-2 has no sdpa."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes: dict[str, Any] = chatty.SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16}
    Gemma2ForCausalLM(Gemma2Config(**sizes)).save_pretrained(tmp_path)
    chatty.tokenizer().save_pretrained(tmp_path)
    model = load_planned(fb.Plan({}, model=str(tmp_path)))[0]
    assert torch.equal(logits(model), stock(tmp_path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "is an address: name the model by its hub id, Qwen/Qwen3-0.6B"),
        ("x" * 300, "is too long for the name of a model"),
        ("package:json", "the package json holds 0 models"),
        ("none.gguf", "there is no GGUF file at none.gguf"),
        ("~nobody-of-that-name/m", "there is no model at ~nobody-of-that-name/m"),
    ],
)
def test_what_is_no_name_of_a_model(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        folder_of(name)
    assert getattr(caught.value, "code", 1) == 2


def test_a_model_in_memory_is_what_its_files_hold(tmp_path: Path) -> None:
    """A plan reads weights from files: what was merged, resized or laid over since would be left out without a word."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    worded(tmp_path)
    how: dict[str, Any] = dict(candidates=["nf4-b32"], objective="weight", dtype="float32", max_length=16, fast=False)
    load: Any = AutoModelForCausalLM.from_pretrained
    assert plan_model(load(tmp_path, dtype=torch.bfloat16).float(), None, **how).modules, "rounded on the way"
    over = get_peft_model(load(tmp_path), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="has an adapter of peft over it, which a plan would leave out"):
        plan_model(over, None, **how)
    larger = load(tmp_path)
    larger.resize_token_embeddings(130)
    for changed, name in ((over.merge_and_unload(), "layers.1.self_attn.q_proj"), (larger, "embed_tokens")):
        with pytest.raises(ValueError, match=f"{name}.weight of this model is not what .* holds, .*save it"):
            plan_model(changed, None, **how)


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "BertForTokenClassification", "WhisperForConditionalGeneration", "LlamaForQuestionAnswering"]
)
def test_half_a_model_or_one_that_sees_what_it_predicts_is_no_causal_one(tmp_path: Path, name: str) -> None:
    """transformers would make causal language models of them, of which one that fills gaps sees the very token that it is to predict, and one
    that listens has no ears."""
    import transformers

    getattr(transformers, name.partition("For")[0] + "Config")(architectures=[name]).save_pretrained(tmp_path)
    with pytest.raises(Unreadable, match=f"holds a {name}: no such model is for causal_lm, classification, image_classification"):
        config_of(tmp_path)
