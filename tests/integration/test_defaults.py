"""Every task with every adapter, all else left as it is by default: what is asked of it before and after, and in its export. Either all of it
is made, or one sentence says why not before anything is started. Training itself is left out: the trained weights are moved by noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import chatty
from classifiers import decoder, encoder, pictures
from finebits import job, registry, runfolder
from finebits.errors import FinebitsError
from finebits.recipe import Recipe
from finebits.run import tune
from finebits.run.__main__ import make

QUICK = {  # one of every way in which adapters lie in a model
    "causal_lm": (
        "lora",
        "dora",
        "ia3",
        "vera",
        "oft",
        "bitfit",
        "sparse",
        "prefix_tuning",
        "prompt_tuning",
        "p_tuning",
        "bottleneck",
        "peqa",
    ),
    "classification": ("lora", "dora", "prefix_tuning", "prompt_tuning"),
    "classifying_decoder": ("prefix_tuning",),
    "image_classification": ("lora", "vera"),
}
RECIPE = """
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{datasets: [{{path: {model}/train.jsonl}}], held_out: {{path: {model}/held.jsonl}}, max_length: {length}}}
quantization: {{candidates: [nf4-b32-bf16], objective: weight}}
budget: {{memory: 6 bits}}
adapter: {{paper: {adapter}}}
output_dir: {out}
"""


def chats(folder: Path) -> Path:
    chatty.model(folder, num_hidden_layers=1)
    for name, count in (("train", 6), ("held", 4)):
        chatty.written(folder / f"{name}.jsonl", chatty.rows(count))
    return folder


MADE = {"causal_lm": chats, "classification": encoder, "classifying_decoder": decoder, "image_classification": pictures}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    return {task: made(tmp_path_factory.mktemp(task)) for task, made in MADE.items()}


def moved(part: Any, plan: Any, resume: bool = False) -> Any:
    """In the place of training."""
    import finebits as fb
    from finebits.interop.hf import load_with

    model, gen = load_with(part.processor, part.run / runfolder.STARTED), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1e-3 * torch.randn(p.shape, generator=gen))
    fb.save(model, part.run / runfolder.MODEL)
    return model


def grid() -> list[Any]:
    return [
        pytest.param(task, name, marks=() if name in quick else pytest.mark.every)
        for task, quick in QUICK.items()
        for name in registry.names("adapters")
    ]


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")  # PEFT, of layers without a bias: nothing here merges in PEFT
@pytest.mark.parametrize(("task", "adapter"), grid())
def test_defaults_go_the_whole_way(
    task: str, adapter: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(job, "work", make)
    monkeypatch.setattr(tune, "fit", moved)
    out = tmp_path / "out"
    recipe = Recipe.parse(RECIPE.format(model=models[task], adapter=adapter, length=8 if task.startswith("classif") else 32, out=out))
    try:
        job.train(recipe)
    except FinebitsError as e:
        assert not (out / runfolder.RECIPE).exists(), f"refused too late: {e}"
        assert e.code == 2 and any(way in str(e) for way in ("export", "take ", "quantiz")), str(e)
        return
    entries = {e["key"]: e for e in json.loads((out / "evaluation.json").read_text())["entries"]}
    assert ("export" in entries) == ("adapter" in recipe.export.to) and all(0 < e["loss"] < 20 for e in entries.values())
    targets = json.loads((out / "export.json").read_text())["targets"] if recipe.export.to else []
    assert [t["name"] for t in targets] == recipe.export.to and all(t["verdict"] in ("same", "ok") for t in targets)
    samples = json.loads((out / "samples.json").read_text())
    assert len(samples) == 3 and all(isinstance(s["before"], str) and isinstance(s["after"], str) for s in samples)
    assert (out / "report.html").stat().st_size > 10_000
