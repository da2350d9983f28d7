"""Every task goes the whole way: plan, gate, start, train, evaluate, export, verify, by the same verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from classifiers import SMALL, encoder, pictures
from finebits import job
from finebits.recipe import Recipe
from finebits.run.__main__ import make


@pytest.mark.parametrize(("task", "made"), [("classification", encoder), ("image_classification", pictures)])
def test_the_whole_way(task: str, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stages one after the other in this process."""
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(job, "work", make)
    torch.manual_seed(0)
    folder, out = made(tmp_path / "model"), tmp_path / "out"
    recipe = f"""
task: {task}
model: {{model_name_or_path: {folder}, dtype: float32}}
data: {{datasets: [{{path: {folder / "train.jsonl"}}}], held_out: {{path: {folder / "held.jsonl"}}}, max_length: 16}}
budget: {{memory: 3.5 bits}}
quantization: {{candidates: [nf2-b32-bf16, nf4-b32-bf16], objective: fisher, calibration_rows: 8}}
adapter: {{rank: 4, init: qera}}
training: {{max_steps: 40, learning_rate: 1.0e-2, per_device_train_batch_size: 8, logging_steps: 1}}
evaluation: {{samples: 2, per_device_eval_batch_size: 8}}
export: {{to: [adapter, merged]}}
output_dir: {out}
"""
    job.train(Recipe.parse(recipe))
    scores = json.loads((out / "evaluation.json").read_text())
    assert (scores["rows"], scores["tokens"], scores["unit"]) == (24, 24, "labels")
    entries = {e["key"]: e for e in scores["entries"]}
    tuned = entries[scores["main"]]
    assert tuned["accuracy"] == 1.0 and tuned["loss"] < entries["full"]["loss"] / 2
    assert tuned["intervals"]["accuracy"] == [1.0, 1.0] and tuned["paired"]["accuracy"][0] > 0 and "perplexity" not in tuned
    assert entries["export"]["loss"] == pytest.approx(tuned["loss"], abs=1e-4)
    targets = json.loads((out / "export.json").read_text())["targets"]
    assert [t["name"] for t in targets] == ["adapter", "merged"] and all(t["verdict"] in ("same", "ok") for t in targets)
    samples = json.loads((out / "samples.json").read_text())
    assert len(samples) == 2 and all(s["after"].split()[0] == s["reference"] or task != "classification" for s in samples)
    assert "accuracy" in (out / "report.html").read_text()
    plan = json.loads((out / "plan.json").read_text())
    assert (plan["memory"].get("inputs", 0) > 0) == (task == "image_classification")


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "Llama", "ViT"])
def test_states_and_head_are_the_models_own(kind: str) -> None:
    """Loss and outputs of the task are those of the stock model, whatever it pools."""
    import transformers

    from finebits.tasks import base as tasks

    torch.manual_seed(0)
    shape: dict[str, Any] = SMALL | {
        "num_labels": 3,
        "pad_token_id": 0,
        "vocab_size": 50,
        "max_position_embeddings": 40,
        "initializer_range": 0.2,
    }
    shape |= {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2} if kind == "DistilBert" else {}
    shape |= {"image_size": 8, "patch_size": 4, "num_channels": 1} if kind == "ViT" else {}
    name = f"{kind}For{'Image' if kind == 'ViT' else 'Sequence'}Classification"
    model: Any = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**shape)).eval()
    task = tasks.of(model)
    ids = torch.randint(3, 50, (4, 9))
    ids[2, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()} if kind != "ViT" else {"pixel_values": torch.rand(4, 1, 8, 8)}
    batch |= {"labels": torch.tensor([0, 2, 1, 2])}
    stock = model(**batch)
    torch.testing.assert_close(task.head(model)(task.states(model, batch)), stock.logits.float())
    torch.testing.assert_close(task.loss(model, batch) / tasks.labelled(batch, task), stock.loss)
    assert task.outputs() == 3


def test_a_recipe_names_the_task_of_its_model() -> None:
    from transformers import BertConfig

    from finebits.tasks import base as tasks

    config = BertConfig(architectures=["BertForSequenceClassification"])
    tasks.agree("auto", config)
    tasks.agree("classification", config)
    with pytest.raises(tasks.WrongTask, match="task: classification"):
        tasks.agree("causal_lm", config)
    with pytest.raises(ValueError, match="classification"):
        tasks.agree("clasification", config)
    with pytest.raises(ValueError, match="problem_type") as caught:
        tasks.of(BertConfig(architectures=["BertForSequenceClassification"], problem_type="regression", num_labels=2))
    assert caught.value.code == 2
