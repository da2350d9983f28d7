"""Every target that holds codes: the library it is for loads the folder and computes what was trained; what it cannot hold is refused before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits import registry
from finebits.build import hosts
from finebits.evaluate.exact import float32
from finebits.export.base import CannotHold, Extras, VerificationFailed, check, check_plan, target
from finebits.interop.peft import export, stock, verify

HELD = {  # target -> two formats that it holds as they are
    "bitsandbytes": (fb.NF(4, 32), fb.FP4(32, "bnb")),
    "compressed_tensors": (fb.Int(4, 32, True, "bf16"), fb.Int(8, "row", True, "bf16")),
    "gptq": (fb.Int(4, 32, True, "fp16"), fb.Int(8, 32, True, "fp16", "full")),
    "gguf": (fb.Int(4, 32, False, "fp16"), fb.Int(8, 32, True, "fp16")),
}
NEEDED = {"bitsandbytes": "bitsandbytes", "compressed_tensors": "compressed_tensors", "gguf": "gguf"}
every = pytest.mark.parametrize("to", HELD)


def tuned(to: str, dtype: str = "float32", **more: object):
    """Two formats, one linear left dense, ranks that differ."""
    first, second = HELD[to]
    specs = {"down_proj": fb.Spec(second, adapter=fb.LoRA(rank=2)), "k_proj": fb.Spec()}
    plan = tiny.plan(fb.LoRA(rank=3, alpha=5.0), first, fb.Zeros(), dtype, **specs)
    return tiny.tuned(plan, tiny.fresh(dtype=getattr(torch, dtype), **more))


def needs(to: str) -> None:
    if to in NEEDED:
        pytest.importorskip(NEEDED[to])


def test_all_targets_with_codes_are_tested() -> None:
    assert {*HELD, "adapter", "peft", "merged", "packed"} == set(registry.names("export"))


@every
def test_its_library_loads_what_was_trained(to: str, tmp_path: Path) -> None:
    needs(to)
    model = tuned(to)
    row = export(model, tmp_path / "x", to)
    files = {str(f.relative_to(tmp_path / "x")): f.stat().st_size for f in (tmp_path / "x").rglob("*")}
    said = {name: file.size for name, file in target(to).files(model, Extras()).items()}
    assert said == {name: files[name] for name in said} and row["bytes"] == sum(said.values())
    result = verify(tmp_path / "x", to, model, tiny.batches())
    assert result["verdict"] == "same" and result["bytes"] == row["bytes"]
    assert NEEDED.get(to, "finebits").replace("_", "-") in result["reader"]
    if to == "gptq":
        return  # loaded by GPTQModel, which is not installed for tests
    with float32(model):
        wanted = tiny.logits(model)
    theirs = stock(tmp_path / "x", to).train()  # bitsandbytes multiplies in bfloat16 on some CPUs, but not in training
    assert float((tiny.logits(theirs) - wanted).abs().max()) < 1e-3


@every
def test_the_codes_of_a_bfloat16_model_are_kept(to: str, tmp_path: Path) -> None:
    """And are smaller than the dense base; without an adapter there is the base alone."""
    needs(to)
    model = tuned(to, "bfloat16", tie_word_embeddings=True)
    for _, host in hosts(model):
        for name in list(host.kinds):
            host.remove(name)
    row = export(model, tmp_path / "x", to)
    beside = {"Modelfile"} if to == "gguf" else set()
    assert {f.name for f in (tmp_path / "x").iterdir()} == {"base", "finebits.json"} | beside
    dense = sum(p.numel() * 2 for p in tiny.fresh(tie_word_embeddings=True).parameters())
    assert row["bytes"] < dense
    assert verify(tmp_path / "x", to, model, tiny.batches())["verdict"] == "same"


def test_compressed_tensors_with_zero_points(tmp_path: Path) -> None:
    needs("compressed_tensors")
    model = tiny.tuned(tiny.plan(fb.LoRA(rank=2), fb.Int(8, 32, False, "bf16", "integer"), fb.Zeros()))
    export(model, tmp_path / "x", "compressed_tensors")
    assert verify(tmp_path / "x", "compressed_tensors", model, tiny.batches())["verdict"] == "same"
    with float32(model):
        wanted = tiny.logits(model)
    assert float((tiny.logits(stock(tmp_path / "x", "compressed_tensors")) - wanted).abs().max()) < 1e-3


@every
def test_a_changed_code_is_found(to: str, tmp_path: Path) -> None:
    needs(to)
    model = tuned(to)
    export(model, tmp_path / "x", to)
    (file,) = [f for f in (tmp_path / "x" / "base").iterdir() if f.suffix in (".safetensors", ".gguf")]
    held = bytearray(file.read_bytes())
    (name, host) = next((n, h) for n, h in hosts(model) if n.endswith("down_proj"))
    part = {"bitsandbytes": "weight", "compressed_tensors": "weight_packed", "gptq": "qweight"}.get(to)
    if part is None:
        import gguf

        tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_down.weight")
        a, b = tensor.data_offset, tensor.data_offset + tensor.n_bytes
        at = [i for i in range(a, b) if (i - a) % 34 >= 2]  # behind the scales
    else:
        head = int.from_bytes(held[:8], "little")
        a, b = json.loads(held[8 : 8 + head])[f"{name}.{part}"]["data_offsets"]
        at = list(range(8 + head + a, 8 + head + b))
    for i in at:
        held[i] ^= 0x20
    file.write_bytes(held)
    with pytest.raises(VerificationFailed, match="tolerance 0.001, binding"):
        verify(tmp_path / "x", to, model, tiny.batches())


@every
def test_what_it_cannot_hold_is_refused_with_a_way_out(to: str, tmp_path: Path) -> None:
    model = tiny.tuned(tiny.plan(format=fb.NF(3, 32)))
    with pytest.raises(
        CannotHold, match=rf"{to} cannot hold this as it is: model.layers.0.self_attn.q_proj: .*can: adapter, merged, packed, peft$"
    ) as e:
        check_plan(model.finebits.plan, [to])
    assert e.value.code == 2
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj: "):
        export(model, tmp_path / "x", to)
    assert not (tmp_path / "x").exists()


def test_targets_are_named_that_hold_all() -> None:
    with pytest.raises(CannotHold, match="can: adapter, gguf, gptq, merged, packed, peft$"):
        check({"a": (fb.Int(4, 32, True, "fp16"), (64, 64)), "b": (None, (3, 3))}, ["merged", "bitsandbytes"], torch.bfloat16)
    with pytest.raises(CannotHold, match="float16.*rounded|rounded.*bfloat16"):  # its readers have scales in the model's dtype
        check({"a": (fb.Int(4, 32, True, "fp16"), (64, 64))}, ["compressed_tensors"], torch.bfloat16)
    zeros = fb.Int(4, 32, False, "bf16", "integer")
    check({"a": (zeros, (64, 64)), "b": (None, (3, 3))}, ["compressed_tensors"])
    with pytest.raises(CannotHold, match="zero points .* where all matrices have one format"):
        check({"a": (zeros, (64, 64)), "b": (fb.Int(4, 32, True, "bf16"), (64, 64))}, ["compressed_tensors"])
    with pytest.raises(CannotHold, match="rows of 80"):
        check({"a": (fb.NF(4, 64), (64, 80))}, ["bitsandbytes"])


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finebits.export import base

    monkeypatch.setattr(base.shutil, "disk_usage", lambda place: type("", (), {"free": 1000}))
    with pytest.raises(OSError, match="x would take .* and the disk has 1000 B free"):
        export(tuned("gptq"), tmp_path / "x", "adapter")
    assert not (tmp_path / "x").exists()


# GGUF ----------------------------------------------------------------------------------------------------------------------------------


def byte_level(splitting: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    words = {w: i for i, w in enumerate(["<pad>", "<s>", "<|end|>", *sorted(letters)[:96], "he", "hello", "lo", "llo"])}
    inner = Tokenizer(models.BPE(words, [("h", "e"), ("l", "o"), ("l", "lo"), ("he", "llo")]))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), last])
    inner.pre_tokenizer = {"gpt-2": last, "smollm": digits, "other": pre_tokenizers.Whitespace()}[splitting]  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>", chat_template="{{ 1 }}")


@pytest.mark.parametrize("splitting", ["gpt-2", "smollm"])
def test_a_tokenizer_travels_in_gguf(splitting: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tokenizer = byte_level(splitting)
    export(tuned("gguf"), tmp_path / "x", "gguf", tokenizer)
    read = gguf.GGUFReader(tmp_path / "x" / "base" / "model.gguf")
    said = {k: f.contents() for k, f in read.fields.items()}
    assert said["tokenizer.ggml.pre"] == splitting and said["tokenizer.ggml.model"] == "gpt2"
    assert [t for t in said["tokenizer.ggml.tokens"] if not t.startswith("[PAD")] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert said["tokenizer.ggml.merges"] == ["h e", "l o", "l lo", "he llo"] and len(said["tokenizer.ggml.tokens"]) == 128
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert said["tokenizer.chat_template"] == "{{ 1 }}" and said["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


def test_the_gguf_adapter_is_the_update(tmp_path: Path) -> None:
    """Factors by llama.cpp's names; rows of q and k as its attention has them: pairs of what is rotated together."""
    gguf = pytest.importorskip("gguf")
    model = tuned("gguf")
    export(model, tmp_path / "x", "gguf")
    read = gguf.GGUFReader(tmp_path / "x" / "adapter.gguf")
    held = {t.name: torch.from_numpy(t.data.copy()) for t in read.tensors}
    assert read.fields["adapter.lora.alpha"].contents() == 3 and read.fields["general.type"].contents() == "adapter"
    host = dict(hosts(model))["model.layers.1.self_attn.q_proj"]
    p = host.p["default"]
    update = host.kinds["default"].s * p["B"] @ p["A"]
    pairs = update.reshape(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
    torch.testing.assert_close(held["blk.1.attn_q.weight.lora_b"] @ held["blk.1.attn_q.weight.lora_a"], pairs.detach())


def test_models_and_tokenizers_that_gguf_is_not_written_of_are_named(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="this tokenizer is another: export merged"):
        export(tuned("gguf"), tmp_path / "x", "gguf", byte_level("other"))
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="without scaled positions"):
        export(tuned("gguf", rope_parameters=scaled), tmp_path / "x", "gguf")
    with pytest.raises(
        CannotHold, match="llama, mistral, qwen2, qwen3 here, and this is opt.* that can: adapter, .*gptq, merged, packed, peft"
    ):
        check_plan(tuned("gptq").finebits.plan, ["gguf"], {"model_type": "opt"})
    assert not (tmp_path / "x").exists()
