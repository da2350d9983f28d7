"""Preferences by the command, from rows to an export: over a base in 4 bits, held-out answers are preferred that were not before, and stock
libraries load what learned it. Stages run one after the other in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # chatty
pytest.importorskip("trl")

import chatty
from finebits import job
from finebits.cli import main
from finebits.run.__main__ import make


def pair(i: int, liked: bool) -> dict[str, Any]:
    """A prompt, and an answer: the one that the model would rather not give is liked."""
    return {"prompt": f"say {i}", "completion": "zyxw" if liked else "abcd", "label": liked}


def records(objective: str, numbers: range) -> list[dict[str, Any]]:
    single = [pair(i, liked) for i in numbers for liked in (True, False)]
    if objective == "kto":
        return single
    return [{"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]} for a, b in zip(single[::2], single[1::2])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatty.model(tmp_path_factory.mktemp("m") / "m")


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_answers_are_preferred_and_exported(
    objective: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(job, "work", make)
    train = chatty.written(tmp_path / "train.jsonl", records(objective, range(12)))
    held = chatty.written(tmp_path / "held.jsonl", records(objective, range(20, 30)))
    out = tmp_path / "out"
    words = f"""model.dtype=float32 data.held_out.path={held} data.max_length=32 quantization.candidates=[nf4-b32-bf16]
quantization.objective=weight adapter.rank=4 adapter.init=zeros evaluation.samples=0 output_dir={out} --loss {objective} --max-steps 8
--learning-rate 1e-2 --per-device-train-batch-size 8 --eval-strategy steps --eval-steps 4 --eval-on-start --logging-steps 1"""
    assert main(["train", str(model), str(train), *words.split(), "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)["data"]
    entries = {e["key"]: e for e in shown["evaluation"]["entries"]}
    before, after, theirs = (entries[k]["preference"] for k in ("zeros_start", "zeros", "export"))
    assert after["accuracy"][0] == 1.0 and after["margin"][0] > before["margin"][0] and after["loss"][0] < before["loss"][0]
    assert theirs["margin"] == pytest.approx(after["margin"], abs=1e-3)
    assert shown["evaluation"]["rows"] == 10  # the answers that were wanted
    assert [t["verdict"] for t in shown["export"]["targets"]] == ["same"]
    config = json.loads((out / "export" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4
    seen = [e for e in map(json.loads, (out / "runs" / "zeros" / "events.jsonl").read_text().splitlines()) if e["event"] == "eval"]
    assert [e["step"] for e in seen] == [0, 4, 8] and seen[-1]["accuracy"] == 1.0
    assert seen[0]["accuracy"] == 0.0 if objective == "orpo" else seen[0]["margin"] == pytest.approx(0.0, abs=1e-4)  # against itself
    assert main(["eval", str(out), "--data", str(held), "--no-exports", "--format", "json"]) == 0
    again = json.loads(capsys.readouterr().out)["data"]
    found = {e["key"]: e for e in again["entries"]}
    assert again["rows"] == 10 and found["tuned"]["loss"] == pytest.approx(entries["zeros"]["loss"], abs=1e-4)
    assert found["tuned"]["preference"]["margin"][0] == pytest.approx(after["margin"][0], abs=1e-3)
