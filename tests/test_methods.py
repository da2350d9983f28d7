"""The comparison of methods, on a tiny model: one of ours and one of stock PEFT, with the keys that PEFT's own comparison has."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny_llama as tiny
from forked import forked

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "methods.py"
KEYS = {
    "run_info": {"created_at", "total_time", "experiment_name", "train_config", "peft_config", "error_msg"},
    "train_info": {
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time", "file_size",
        "num_trainable_params", "num_total_params", "status", "metrics",
    },
    "meta_info": {"package_info", "system_info"},
}  # fmt: skip


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    rows = [json.dumps({"text": " ".join(f"w{(i * k) % 126 + 1}" for k in range(12))}) for i in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "held_out.jsonl").write_text("\n".join(rows[:9]))
    if not (tmp_path / "model").exists():
        tiny.worded(tmp_path / "model")
    asked = ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--page", str(tmp_path / "m.md")]
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *asked, "--steps", "2", "--length", "16", "--rates", "1e-2", *more])
    methods = importlib.import_module("methods")

    def piece(command: list[str], **_: Any) -> Any:
        """In a copy of this process."""

        def main() -> None:
            sys.argv = command[1:]
            methods.main()

        return subprocess.CompletedProcess(command, forked(main))

    monkeypatch.setattr(methods.subprocess, "run", piece)
    methods.main()
    return {f.name: json.loads(f.read_text()) for f in (tmp_path / "out").glob("*.json")}


def test_pieces_have_pefts_keys_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(tmp_path, monkeypatch, "--bits", "16", "--only", "lora", "peft-lora")
    assert set(made) == {f"{name}--16-bits--1e-2.json" for name in ("lora", "peft-lora")}
    for piece in made.values():
        assert piece["train_info"]["status"] == "success" and all(keys == set(piece[part]) for part, keys in KEYS.items())
    ours, theirs = (made[f"{name}--16-bits--1e-2.json"]["train_info"] for name in ("lora", "peft-lora"))
    assert ours["num_trainable_params"] == theirs["num_trainable_params"]
    assert abs(ours["metrics"][0]["train loss"] - theirs["metrics"][0]["train loss"]) < 0.05  # the same rows, from the same weights
    page = (tmp_path / "m.md").read_text()
    assert "## 16 bits" in page and "lora over peft-lora:" in page and (tmp_path / "m.svg").read_text().startswith("<svg")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*.json")}
    run(tmp_path, monkeypatch, "--bits", "16", "--only", "lora", "peft-lora")
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*.json")}
