"""Adapters that others wrote: LoRA in GGUF files, LoftQ's folders, and every key of a PEFT config, which is honoured or refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import finebits as fb
import tiny_llama as tiny
from finebits.build import all_hosts
from finebits.interop.peft import export
from finebits.interop.peft_folder import CONFIG, TENSORS
from finebits.interop.selecting import Mistake
from finebits.interop.tokenizer import tokenizer_of

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "k_proj", "down_proj"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a LoRA over it."""
    place = tmp_path_factory.mktemp("given")
    base = tiny.worded(place / "base")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(place / "lora")
    return place


def changed(given: Path, place: Path, **more: Any) -> Path:
    shutil.copytree(given / "lora", place)
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(config | more))
    return place


def test_a_lora_of_llama_cpp(given: Path, tmp_path: Path) -> None:
    """Ours is written as its converter writes one: rows of q and k turned, one alpha."""
    pytest.importorskip("gguf")
    model = fb.load_peft(given / "lora", fb.build(tiny.fresh(), fb.Plan({"model.layers.0.mlp.up_proj": fb.Spec()})))
    export(model, tmp_path / "x", "gguf")
    alone = tmp_path / "alone"  # without the base that it was exported over, in GGUF
    alone.mkdir()
    shutil.copy(tmp_path / "x" / "adapter.gguf", alone)
    theirs = fb.load_peft(alone / "adapter.gguf", given / "base")
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(model), rtol=1e-5, atol=1e-5)
    plan = fb.plan_model(str(given / "base"), None, folder=str(alone), max_length=16, dtype="float32")
    assert sum(spec.adapter is not None for spec in plan.modules.values()) == 6
    assert any("not here to compare" in notice for notice in plan.notices)
    other = tiny.fresh(hidden_size=32)
    with pytest.raises(ValueError, match="settings and model ask for"):
        fb.load_peft(alone, other)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"adapter.type": "control"}, "and no LoRA"),
        ({"adapter.lora.alpha": float("nan")}, "adapter.lora.alpha is nan"),
        ({"tensor": "blk.9.attn_q.weight.lora_a"}, "none of a pair"),
        ({"tensor": "blk.0.attn_q.scale"}, "none of a pair"),
    ],
)
def test_what_is_no_lora_of_llama_cpp_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", change.get("adapter.type", "lora"))
    writer.add_float32("adapter.lora.alpha", change.get("adapter.lora.alpha", 4.0))
    writer.add_tensor(change.get("tensor", "blk.0.attn_q.weight.lora_a"), torch.ones(2, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=said):
        fb.load_peft(tmp_path / "a.gguf", tiny.fresh())


def test_loftq_as_it_is_published(given: Path, tmp_path: Path) -> None:
    """The base holds what quantization leaves of the weights, the adapter lies in a folder inside; the two give the model back."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(given / "base")
    whole = tiny.logits(stock)
    place = tmp_path / "model-4bit-8rank"
    shutil.copytree(given / "base", place)
    tensors = load_file(place / "model.safetensors")
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(stock, config)
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            key = name.removeprefix("base_model.model.") + ".weight"
            W = tensors[key].float()
            q = fb.quantize(W, fb.NF(4, 32)).dequantize()
            U, S, Vh = torch.linalg.svd(W - q)
            module.lora_A["default"].weight.data = Vh[:8]
            module.lora_B["default"].weight.data = U[:, :8] * S[:8]
            tensors[key] = q
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    adapted.peft_config["default"].base_model_name_or_path = str(place)
    adapted.save_pretrained(place / "loftq_init")
    near = tiny.logits(fb.load_peft(place, place))
    assert (near - whole).norm() < 0.8 * (tiny.logits(AutoModelForCausalLM.from_pretrained(place)) - whole).norm()
    others = {".*(v_proj|o_proj|gate_proj|up_proj)": None}
    plan = fb.plan_model(str(place), None, folder=str(place), candidates=["nf4-b32"], overrides=others, max_length=16, dtype="float32")
    assert not any("not here to compare" in notice for notice in plan.notices)
    torch.testing.assert_close(tiny.logits(fb.load_planned(plan)[0]), near, rtol=1e-4, atol=1e-4)  # its weights are on the grid already
    with pytest.raises(Mistake, match="another model"):
        fb.plan_model(str(given / "base"), None, folder=str(place), max_length=16, dtype="float32")


# What each key is changed to, and what is said of it; None: it says nothing of what is computed, and the adapter is read as before.
CHANGES: dict[str, tuple[Any, str | None]] = {
    "task_type": ("SEQ_CLS", "task_type is SEQ_CLS"),
    "peft_type": ("LOHA", "peft_type is LOHA"),
    "auto_mapping": ({"base_model_class": "OPTForCausalLM", "parent_library": "transformers"}, "auto_mapping says"),
    "peft_version": ("99.0", None),
    "base_model_name_or_path": ("OTHER", "another model"),
    "revision": ("abc", "revision is abc"),
    "inference_mode": (False, None),
    "r": (5, "settings and model ask for"),
    "target_modules": (["q_proj", "k_proj"], "target_modules in adapter_config.json does not name it"),
    "exclude_modules": (["q_proj"], "exclude_modules names"),
    "lora_alpha": (12, "doubled"),
    "lora_dropout": (1.5, "lora_dropout is 1.5"),
    "fan_in_fan_out": (True, None),  # how the base holds its weights, which PEFT itself sets right
    "bias": ("some", "bias is 'some'"),
    "use_rslora": (True, "doubled"),
    "modules_to_save": (["lm_head"], "modules_to_save names lm_head"),
    "init_lora_weights": ("pissa", "init_lora_weights is 'pissa'"),
    "layers_to_transform": ([0], "layers_to_transform is"),
    "layers_pattern": ("(", "layers_pattern has"),
    "rank_pattern": ({"nothing": 4}, "rank_pattern names 'nothing'"),
    "alpha_pattern": ({"nothing": 4}, "alpha_pattern names 'nothing'"),
    "megatron_config": ({"a": 1}, "megatron_config is"),
    "megatron_core": ("other", None),  # read with megatron_config alone
    "trainable_token_indices": ([1, 2], "trainable_token_indices is"),
    "loftq_config": ({"loftq_bits": 4}, "loftq_config is"),
    "eva_config": ({"rho": 2.0}, None),  # how it began
    "corda_config": ({"a": 1}, "corda_config is"),
    "lora_ga_config": ({"a": 1}, "lora_ga_config is"),
    "use_dora": (True, "lora_magnitude_vector"),
    "velora_config": ({"a": 1}, "velora_config is"),
    "alora_invocation_tokens": ([1], "alora_invocation_tokens is"),
    "use_qalora": (True, "use_qalora is"),
    "qalora_group_size": (4, None),  # read with use_qalora alone
    "monteclora_config": ({"a": 1}, "monteclora_config is"),
    "layer_replication": ([[0, 2]], "layer_replication is"),
    "lora_bias": (True, "lora_bias is"),
    "target_parameters": (["mlp.experts.down_proj"], "target_parameters names"),
    "use_bdlora": ({"a": 1}, "use_bdlora is"),
    "arrow_config": ({"a": 1}, "arrow_config is"),
    "kasa_config": ({"a": 1}, "kasa_config is"),
    "ensure_weight_tying": (True, None),  # of tables, of which there is none
    "runtime_config": ({"ephemeral_gpu_offload": True}, "runtime_config is"),
    "of_another_peft": (3, "of_another_peft is 3"),
}


def test_every_key_of_loras_config_is_known_here() -> None:
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} - CHANGES.keys() == set()


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_is_honoured_or_refused(key: str, given: Path, tmp_path: Path) -> None:
    value, said = CHANGES[key]
    if value == "OTHER":
        value = str(tiny.worded(tmp_path / "other", seed=1))
    place = changed(given, tmp_path / "lora", **{key: value})
    if said is None:
        assert torch.equal(tiny.logits(fb.load_peft(place, given / "base")), tiny.logits(fb.load_peft(given / "lora", given / "base")))
    elif said == "doubled":
        (_, old), (_, new) = (
            next((n, h) for n, h in all_hosts(fb.load_peft(f, given / "base")) if h.kinds) for f in (given / "lora", place)
        )
        assert new.kinds["default"].s == 2 * old.kinds["default"].s
    else:
        with pytest.raises(fb.FinebitsError) as e:
            fb.load_peft(place, given / "base")
        assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "more,said",
    [
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is"),
        ({"lora_alpha": "x"}, "lora_alpha is"),
        ({"use_rslora": "yes"}, "use_rslora is"),
        ({"rank_pattern": {"(a+)+b": 4}}, "no expression"),
        ({"rank_pattern": {"(": 4}}, "no expression"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"rank_pattern": [4]}, "rank_pattern is"),
        ({"target_modules": [1]}, "target_modules is"),
        ({"target_modules": TARGETS + ["o_proj"]}, "target_modules names 'o_proj'"),
        ({"target_modules": ".*(q|k)_proj"}, "does not name it"),
        ({"layers_to_transform": [0, 1, 7]}, "layers_to_transform names 7"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is"),
    ],
)
def test_values_of_other_kinds_and_places_that_are_none(more: dict[str, Any], said: str, given: Path, tmp_path: Path) -> None:
    with pytest.raises(fb.FinebitsError) as e:
        fb.load_peft(changed(given, tmp_path / "lora", **more), given / "base")
    assert said in str(e.value) and "\n" not in str(e.value)


def test_tensors_that_are_missing(given: Path, tmp_path: Path) -> None:
    place = changed(given, tmp_path / "lora")
    tensors = {k: v for k, v in load_file(place / TENSORS).items() if "layers.1.self_attn.q_proj" not in k}
    save_file(tensors, place / TENSORS)
    with pytest.raises(ValueError, match="target_modules names model.layers.1.self_attn.q_proj .* the copy is not complete"):
        fb.load_peft(place, given / "base")


def test_an_adapter_is_tied_to_its_base(given: Path, tmp_path: Path) -> None:
    model = fb.load_peft(given / "lora", given / "base")
    export(model, tmp_path / "x", "adapter", tokenizer_of(given / "base"))
    theirs = fb.load_peft(tmp_path / "x", tmp_path / "x" / "base")
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(model), rtol=1e-5, atol=1e-5)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "x", moved, ignore=lambda folder, names: {"base"} & set(names))
    other = tiny.worded(tmp_path / "other", seed=1)
    for folder in (tmp_path / "x", moved):
        with pytest.raises(ValueError, match="and that is another model than"):
            fb.load_peft(folder, other)
