"""finebits in other people's code: transformers, its pipelines and Trainer, TRL, PEFT and accelerate load, run, train and save packed models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.build import Adapted
from finebits.errors import Unsupported
from finebits.interop.peft import export, stock, verify
from finebits.qtensor import QTensor

UP = "model.layers.0.mlp.up_proj"
TABLE = {"model.embed_tokens": "int8-b32"}


def load(path: Path, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **more)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, packed as it was read."""
    from transformers import AutoTokenizer

    place = tmp_path_factory.mktemp("packed")
    tiny.worded(place / "dense")
    load(place / "dense", quantization_config=fb.FinebitsConfig("nf4-b32")).save_pretrained(place / "packed")
    AutoTokenizer.from_pretrained(place / "dense").save_pretrained(place / "packed")
    return place / "packed"


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"))


KNOWN = """
from transformers.quantizers import auto
import finebits
assert "finebits" in auto.AUTO_QUANTIZER_MAPPING and "finebits" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
"""
LIGHT = """
import sys
import finebits
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.mark.parametrize("code", [LIGHT + KNOWN, KNOWN], ids=["before", "after"])
def test_importing_registers_before_transformers_and_after(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("own", [{}, TABLE])
def test_packed_as_it_is_read_and_back_bit_for_bit(tied: bool, own: dict[str, str], tmp_path: Path) -> None:
    dense = tiny.folder(tmp_path / "dense", tie_word_embeddings=tied)
    first = load(dense, quantization_config=fb.FinebitsConfig("nf4-b32", own))
    W = first.get_submodule(UP).weight
    assert isinstance(W, QTensor) and isinstance(first.lm_head.weight, QTensor) == bool(own and tied)
    wanted = fb.quantize(tiny.fresh(tie_word_embeddings=tied).get_submodule(UP).weight.detach(), fb.NF(4, 32))
    assert all(torch.equal(W.parts[k], p) for k, p in wanted.parts.items())
    first.save_pretrained(tmp_path / "one")
    second = load(tmp_path / "one")
    assert torch.equal(tiny.logits(first), tiny.logits(second))
    second.save_pretrained(tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    held = sum(p.nbytes if isinstance(p, QTensor) else p.numel() * p.element_size() for p in second.parameters())
    assert held < (tmp_path / "one" / "model.safetensors").stat().st_size < (dense / "model.safetensors").stat().st_size / 2


def test_the_dtype_that_is_asked_for(packed: Path) -> None:
    model = load(packed, dtype=torch.bfloat16)
    W = model.get_submodule(UP).weight
    assert W.dtype == model.model.norm.weight.dtype == torch.bfloat16 and W.parts["scale"].dtype == torch.float32


def test_pipelines_generate(packed: Path) -> None:
    from transformers import pipeline

    said = pipeline("text-generation", str(packed))("w5 w6 w7", max_new_tokens=4, do_sample=False, max_length=None)
    assert said[0]["generated_text"].startswith("w5 w6 w7") and len(said[0]["generated_text"]) > 10


def test_device_maps_and_hooks(packed: Path) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    wanted = tiny.logits(load(packed))
    for place in ("auto", "cpu", {"": "cpu"}):
        assert torch.equal(tiny.logits(load(packed, device_map=place)), wanted)
    hooked = load(packed)
    for module in hooked.modules():
        if list(module.parameters(recurse=False)):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))  # pyright: ignore[reportArgumentType]
    assert torch.equal(tiny.logits(hooked), wanted)
    apart = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk"}
    with pytest.raises(ValueError, match="cpu, disk, and packed weights stay where they compute: .*max_memory"):
        load(packed, device_map=apart, offload_folder="/nowhere")


def test_peft_over_it(packed: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = lora(load(packed)).train()
    model(**tiny.batches()[0]).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14 and all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.02)
    wanted = tiny.logits(model.eval())
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(load(packed), tmp_path)), wanted)
    ours = fb.load_peft(tmp_path, load(packed))
    assert torch.allclose(tiny.logits(ours), wanted, atol=1e-5)
    with pytest.raises(Unsupported, match="dequantize"):
        model.merge_and_unload()
    model.get_base_model().dequantize()
    assert torch.allclose(tiny.logits(model.merge_and_unload()), wanted, atol=1e-4)


def test_trainer_trains_an_adapter(packed: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{k: v[0, :6] for k, v in b.items()} for b in tiny.batches(8, 1)]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        learning_rate=3e-2,
        save_steps=4,
        logging_steps=1,
    )
    trainer = Trainer(model=lora(load(packed)), args=args, train_dataset=rows)  # pyright: ignore[reportArgumentType]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] and (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=load(packed), args=args)


def test_trl_trains_it_by_the_name_of_the_folder(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"text": "w5 w6 w7 w8 w9"}] * 8)
    args = SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, max_length=16, bf16=False)
    config = LoraConfig(r=2, task_type="CAUSAL_LM")
    trainer = SFTTrainer(model=str(packed), args=args, train_dataset=rows, peft_config=config)
    trainer.train()
    base = trainer.model.base_model.model.get_submodule("model.layers.0.self_attn.q_proj").base_layer
    assert isinstance(base, Adapted) and isinstance(base.weight, QTensor)


def test_dense_again(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    wanted = tiny.logits(model)
    model.dequantize()
    assert torch.equal(tiny.logits(model), wanted)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(tiny.logits(load(tmp_path)), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_trained_is_exported_packed(dtype: str, tmp_path: Path) -> None:
    """Of several formats, over a packed table that the head is tied to; and finebits reads the folder as transformers does."""
    dense = tiny.worded(tmp_path / "dense", tie_word_embeddings=True)
    spec = fb.Spec(fb.NF(3, 32), adapter=fb.LoRA(rank=3, alpha=5.0), init=fb.LoftQ(steps=1))
    specs = {n: fb.Spec(fb.Int(4, 32, False), adapter=fb.LoRA(rank=2)) if n.endswith("up_proj") else spec for n in tiny.names()}
    specs |= {"model.embed_tokens": fb.Spec(fb.Int(8, 32))}
    model, tokenizer = fb.load_planned(fb.Plan(specs, model=str(dense), levers=fb.Levers(dtype=dtype)))
    row = export(model, tmp_path / "x", "packed", tokenizer)
    assert verify(tmp_path / "x", "packed", model, tiny.batches())["verdict"] == "same"
    assert row["bytes"] < (dense / "model.safetensors").stat().st_size / 2
    theirs = stock(tmp_path / "x", "packed", getattr(torch, dtype))
    for name in specs:
        own, other = model.get_submodule(name).weight, theirs.get_submodule(name)
        other = getattr(other, "base_layer", other).weight
        assert own.format == other.format and all(torch.equal(own.parts[k], other.parts[k]) for k in own.parts)
    again = fb.load_peft(tmp_path / "x", str(tmp_path / "x" / "base"))
    assert torch.allclose(tiny.logits(again).float(), tiny.logits(model).float(), atol=1e-4 if dtype == "float32" else 0.2)


def test_a_loaded_model_is_a_model_of_finebits(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    fb.save(model, tmp_path / "saved")
    again, _ = fb.load(tmp_path / "saved")
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_what_cannot_be_packed_is_refused_in_a_sentence(packed: Path, tmp_path: Path) -> None:
    dense = packed.parent / "dense"
    with pytest.raises(ValueError, match="needs a format, such as FinebitsConfig"):
        fb.FinebitsConfig()
    with pytest.raises(ValueError, match="a format is written like nf4"):
        fb.FinebitsConfig("four bits")
    with pytest.raises(ValueError, match="has a format for model.layers.9, and the model has no such module"):
        load(dense, quantization_config=fb.FinebitsConfig("nf4-b32", {"model.layers.9": None}))
    with pytest.raises(ValueError, match="model.norm .* a LlamaRMSNorm there"):
        load(dense, quantization_config=fb.FinebitsConfig(modules={"model.norm": "nf4-b32"}))
    with pytest.raises(ValueError, match="groups.* is for folders that are packed"):
        load(dense, quantization_config=fb.FinebitsConfig(groups=[]))


@pytest.mark.parametrize("damage", ["groups", "shape", "lost"])
def test_a_damaged_folder_is_refused(damage: str, packed: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config, tensors = json.loads((packed / "config.json").read_text()), load_file(packed / "model.safetensors")
    if damage == "groups":
        config["quantization_config"]["groups"] = ["nf4"]
    elif damage == "shape":
        tensors[f"{UP}.weight.scale"] = tensors[f"{UP}.weight.scale"][:, :1].contiguous()
    else:
        for name in [n for n in tensors if n.startswith(f"{UP}.weight.")]:
            del tensors[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)):
        load(tmp_path)


def test_models_without_linears_of_their_own_are_sent_to_a_plan(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no nn.Linear to pack beside its head: plan"):
        load(tmp_path, quantization_config=fb.FinebitsConfig("nf4-b32"))
