"""An adapter merged without its base in memory: what PEFT merges, and a folder that is whole or not there however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import finebits as fb
import tiny_llama as tiny
from finebits import artefacts, files, tensorfile
from finebits.artefacts import intact
from finebits.export import _safetensors
from finebits.interop import merging
from forked import forked

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": dict(target_modules=["q_proj", "down_proj"], lora_alpha=6),
    "dora": dict(target_modules=["q_proj", "down_proj"], use_dora=True),
    "the whole head beside it": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "the embeddings": dict(target_modules=["embed_tokens", "q_proj"]),
}


def given(place: Path, how: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A base and an adapter with numbers in it; stock PEFT's merged model."""
    from transformers import AutoModelForCausalLM

    base = tiny.worded(place / "base", dtype=dtype, **more)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=3, task_type="CAUSAL_LM", **CONFIGS[how]))
    gen = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            p.data = torch.randn(p.shape, generator=gen, dtype=torch.float32).to(p.dtype) * 0.1
    model.save_pretrained(place / "adapter")
    return model.merge_and_unload()


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("shard", [5 * 10**9, 40_000])
def test_it_is_what_peft_merges(how: str, shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(_safetensors, "SHARD", shard)
    stock = given(tmp_path, how)
    fb.merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert (len(list((tmp_path / "merged").glob("*.safetensors"))) > 1) == (shard < 10**9)
    ours = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    for name, p in stock.named_parameters():
        torch.testing.assert_close(ours[name].float(), p.bfloat16().float(), rtol=2**-7, atol=1e-6)


def test_no_two_matrices_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(tmp_path, "lora")
    models, most, made, export = list[Any](), list[int](), merging.Tensors.__getitem__, merging.export

    def counted(self: Any, name: str) -> torch.Tensor:
        if models:  # whatever was read before this one has gone again
            there = [n for n, p in models[0].named_parameters() if p.ndim > 1 and ".p." not in n and p.untyped_storage().nbytes() > 8]
            most.append(len(there))
        return made(self, name)

    monkeypatch.setattr(merging.Tensors, "__getitem__", counted)
    monkeypatch.setattr(merging, "export", lambda model, *rest, **named: models.append(model) or export(model, *rest, **named))
    fb.merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert len(most) >= 14 and max(most) == 0


def steps(kill_at: int | None) -> list[int]:
    """Count what writes and moves; at one of them the process is killed."""
    seen = [0]

    def step(function: Any) -> Any:
        def counted(*positional: Any, **named: Any) -> Any:
            seen[0] += 1
            if seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*positional, **named)

        return counted

    tensorfile._bytes, artefacts._move, files.write_text = step(tensorfile._bytes), step(artefacts._move), step(files.write_text)
    return seen


@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
def test_killed_at_ten_points_nothing_half_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(tmp_path, "lora")
    for module, name in ((tensorfile, "_bytes"), (artefacts, "_move"), (files, "write_text")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that each is what it was at the end
    originals = tensorfile._bytes, artefacts._move, files.write_text

    def run(target: Path, kill_at: int | None) -> int:
        return forked(lambda: (steps(kill_at), fb.merge(tmp_path / "adapter", tmp_path / "base", target)))

    seen = steps(None)
    fb.merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "right")
    tensorfile._bytes, artefacts._move, files.write_text = originals
    right, total = load_file(tmp_path / "right" / "model.safetensors"), seen[0]
    assert total >= 20
    for i in range(10):
        target = tmp_path / f"at {i}"
        if i % 2:  # an older result is there, which counts until the new one does
            fb.merge(tmp_path / "adapter", tmp_path / "base", target)
        assert run(target, 1 + i * (total - 1) // 9) == -signal.SIGKILL
        artefacts.settle(target)
        assert intact(target) if i % 2 else (intact(target) or not list(target.glob("*.safetensors")))
        assert run(target, None) == 0 and intact(target)
        found = load_file(target / "model.safetensors")
        assert found.keys() == right.keys() and all(torch.equal(found[k], t) for k, t in right.items())
        assert not (target / artefacts.STAGE).exists()


def test_the_verb_merges_one_or_several_into_the_base_that_they_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finebits.cli import main

    stock = given(tmp_path, "lora")
    shutil.copytree(tmp_path / "adapter", tmp_path / "twin")
    names = [str(tmp_path / name) for name in ("adapter", "twin")]
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert main(["adapters", "merge", names[0], "--out", str(tmp_path / "one")]) == 0
    assert "MiB" in capsys.readouterr().out
    assert main(["adapters", "merge", *names, "--weights", "0.5,1.5", "--out", str(tmp_path / "two")]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, p in stock.named_parameters():
        if name in base:
            torch.testing.assert_close(one[name].float(), p.bfloat16().float(), rtol=2**-7, atol=1e-6)
            torch.testing.assert_close(
                two[name].float(), (2 * p - base[name]).bfloat16().float(), rtol=2**-7, atol=2e-3
            )  # twice the update
    assert main(["adapters", "merge", names[0], "--out", str(tmp_path / "base")]) == 2  # which finebits did not write
    assert load_file(tmp_path / "base" / "model.safetensors").keys() == base.keys()


def test_a_base_that_is_not_named_or_not_one_is_asked_for(tmp_path: Path) -> None:
    given(tmp_path, "lora")
    shutil.copytree(tmp_path / "adapter", tmp_path / "stray")
    config = tmp_path / "stray" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="name the base that the adapters belong to: .*stray say none"):
        merging.merge_several([tmp_path / "stray"], None, tmp_path / "out")
    with pytest.raises(ValueError, match="there is no PEFT adapter at .*nowhere"):
        merging.merge_several([tmp_path / "nowhere"], None, tmp_path / "out")
    with pytest.raises(ValueError, match="say .*base and none"):
        merging.merge_several([tmp_path / "adapter", tmp_path / "stray"], None, tmp_path / "out")
    assert merging.merge_several([tmp_path / "stray"], tmp_path / "base", tmp_path / "out")["name"] == "merged"
    shutil.copytree(tmp_path / "base", tmp_path / "stray" / "base")  # as exports have it
    assert merging.base_named(tmp_path / "stray") == str(tmp_path / "stray" / "base")
