"""What is trained in the format that it is served in: an export holds the codes that training multiplied with, and no adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finebits as fb
import tiny_llama as tiny
from finebits.build import build, hosts
from finebits.evaluate.exact import float32
from finebits.export.base import CannotHold, check_plan
from finebits.interop.peft import export, stock, verify
from finebits.layouts.compressed_tensors import from_compressed, weights_scheme
from finebits.layouts.gptq import from_gptq
from finebits.served import served

STORE = {"compressed_tensors": "fp32", "gptq": "fp16", "gguf": "fp16"}  # of scales, for a float32 model


def cases(to: str) -> list[Any]:
    """(adapter, format of its base)."""
    scale = STORE[to]
    rounded = [(fb.L4Q(rank=2, bits=bits, block=32, scale=scale), None) for bits in (4, 3, 2)]
    return [*rounded, (fb.PEQA(32), fb.Int(4, 32, scale=scale)), (fb.EfficientDM(rank=2, scale=scale), None)]


def trained(adapter: Any, format: Any, dtype: str = "float32") -> Any:
    """A few steps, so that codes and scales are not those of the start."""
    model = build(tiny.fresh(dtype=getattr(torch, dtype)), tiny.plan(adapter, format, fb.Zeros(), dtype))
    before = {name: served(host).dequantize() for name, host in hosts(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for batch in tiny.batches()[:1] * 3:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert all(not torch.equal(served(host).dequantize(), before[name]) for name, host in hosts(model))
    return model.eval()


def read(folder: Path, name: str, format: Any, to: str) -> Any:
    """The weight of a module as files hold it."""
    held = {k.removeprefix(f"{name}."): t for k, t in load_file(folder / "model.safetensors").items() if k.startswith(f"{name}.")}
    if to == "compressed_tensors":
        return from_compressed(held, weights_scheme(format))
    layout = json.loads((folder / "config.json").read_text())["quantization_config"]["checkpoint_format"]
    return from_gptq(held, format.bits, format.symmetric, layout, torch.float32)


@pytest.mark.parametrize("case", range(5), ids=["l4q 4", "l4q 3", "l4q 2", "peqa", "efficientdm"])
def test_packed_says_in_which_format_the_codes_of_an_adapter_are(case: int, tmp_path: Path) -> None:
    """Also over a base that has none of its own."""
    model = trained(*cases("gptq")[case])
    export(model, tmp_path / "x", "packed")
    (groups,) = json.loads((tmp_path / "x" / "base" / "config.json").read_text())["quantization_config"]["groups"]
    assert sorted(groups["modules"]) == sorted(tiny.names())
    assert verify(tmp_path / "x", "packed", model, tiny.batches())["verdict"] == "same"


@pytest.mark.parametrize("to", ["compressed_tensors", "gptq"])
@pytest.mark.parametrize("case", range(5), ids=["l4q 4", "l4q 3", "l4q 2", "peqa", "efficientdm"])
def test_the_codes_of_training_are_those_that_are_read(to: str, case: int, tmp_path: Path) -> None:
    if to == "compressed_tensors":
        pytest.importorskip("compressed_tensors")
    model = trained(*cases(to)[case])
    check_plan(model.finebits.plan, [to, "merged"])
    export(model, tmp_path / "x", to)
    assert not (tmp_path / "x" / "adapter_model.safetensors").exists()
    plain = tiny.fresh()
    for name, host in hosts(model):
        W = served(host)
        found = read(tmp_path / "x" / "base", name, W.format, to)
        half = 2 ** (W.format.bits - 1) if W.format.symmetric else 0
        levels = torch.tensor(W.format.levels()) + half
        assert torch.equal(found.codes().long(), levels[W.codes().long()].long())
        torch.testing.assert_close(found.dequantize(torch.float32), W.dequantize(), rtol=1e-6, atol=1e-6)
        plain.get_submodule(name).weight.data = found.dequantize(torch.float32)
    with float32(model):
        wanted = tiny.logits(model)
    torch.testing.assert_close(tiny.logits(plain), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=1e-5, atol=1e-4)
    assert verify(tmp_path / "x", to, model, tiny.batches())["verdict"] == "same"
    if to == "compressed_tensors":
        torch.testing.assert_close(tiny.logits(stock(tmp_path / "x", to)), wanted, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_model_is_served_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = trained(fb.L4Q(rank=2, bits=4, block=32), None, "bfloat16")
    export(model, tmp_path / "x", "compressed_tensors")
    for name, host in hosts(model):
        found = read(tmp_path / "x" / "base", name, served(host).format, "compressed_tensors")
        assert torch.equal(found.dequantize(), served(host).dequantize())
    assert verify(tmp_path / "x", "compressed_tensors", model, tiny.batches())["verdict"] == "same"


def test_minima_that_moved_are_served_by_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = trained(fb.QALoRA(rank=2, block=32), fb.Int(4, 32, False, "fp16"))
    export(model, tmp_path / "x", "gguf")
    assert not (tmp_path / "x" / "adapter.gguf").exists()
    assert verify(tmp_path / "x", "gguf", model, tiny.batches())["verdict"] == "same"


def test_merged_has_its_dense_form_and_others_say_who_can(tmp_path: Path) -> None:
    model = trained(fb.L4Q(rank=2, bits=4, block=32), None, "bfloat16")
    export(model, tmp_path / "x", "merged")
    assert verify(tmp_path / "x", "merged", model, tiny.batches())["verdict"] == "same"
    for to in ("adapter", "peft"):
        with pytest.raises(
            CannotHold, match=f"target {to} cannot hold L4Q over .*nothing lies beside that; targets that can: .*gptq.*merged"
        ):
            check_plan(model.finebits.plan, [to])
        with pytest.raises(ValueError, match="export target merged writes its weights"):
            export(model, tmp_path / to, to)


def test_is_saved_and_loaded(tmp_path: Path) -> None:
    from finebits.store import apply, read

    model = trained(fb.L4Q(rank=2, bits=3, block=32, symmetric=False), None)
    fb.save(model, tmp_path / "m")
    again = apply(tiny.fresh(), read(tmp_path / "m"))
    assert torch.equal(tiny.logits(again), tiny.logits(model))
