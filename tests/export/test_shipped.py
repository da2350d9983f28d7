"""What a job writes of its exports: a target that is another model is a row like all others, the rest is verified, and the exit code is 6."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_llama as tiny
from finebits import job
from finebits.export.base import VerificationFailed
from finebits.interop import hf, peft
from finebits.interop.runtimes import base as runtimes
from finebits.report.results import failed, held_to, told
from finebits.report.text import export_table
from finebits.run import ship
from finebits.run.stage import Stage
from finebits.runfolder import RunFolder
from test_runfolder import House


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ship targets of a tiny model; `wrong` are those whose files are another model's, `asked` what runtimes were asked with."""
    model, said, asked = tiny.tuned(tiny.plan()), list[str](), list[Any]()
    house = SimpleNamespace(wrong=(), said=said, asked=asked)
    monkeypatch.setattr(ship, "main_run", lambda recipe: "zeros")
    monkeypatch.setattr(hf, "load_with", lambda *given: model)
    real = peft.export

    def export(given: Any, place: Any, to: str, *more: Any, **named: Any) -> Any:
        other = tiny.tuned(tiny.plan(), tiny.fresh(), seed=9) if to in house.wrong else given
        return real(other, place, to, *more, **named)

    def served(folder: Path, to: str, *given: Any) -> list[dict[str, Any]]:
        asked.append(given)
        return [{"name": to, "reader": "vLLM", "verdict": "fail", "note": "it stopped"}] if to == "merged" else []

    monkeypatch.setattr(peft, "export", export)
    monkeypatch.setattr(runtimes, "verify", served)

    def go(*to: str) -> dict[str, Any]:
        recipe = SimpleNamespace(to_yaml=lambda: "", evaluation=SimpleNamespace(per_device_eval_batch_size=3))
        meter = SimpleNamespace(phase=lambda name: contextlib.nullcontext(), peaks={})
        part: Any = SimpleNamespace(
            recipe=recipe,
            folder=RunFolder(tmp_path),
            processor=None,
            batches=tiny.batches(),
            plan=model.finebits.plan,
            meter=meter,
            phase=lambda name: None,
            progress=SimpleNamespace(say=said.append),
            model_folder=tmp_path,
        )
        ship.ship(part, Stage("export", "export", to=to, verify=True, rows=3))
        return json.loads((tmp_path / "export.json").read_text())

    house.go = go
    return house


def test_the_rest_is_verified_behind_what_failed(shipped: Any) -> None:
    shipped.wrong = ("packed",)
    table = shipped.go("packed", "merged")
    packed, merged = table["targets"]
    assert packed["verdict"] == "fail" and packed["kl"] > 0.01 and packed["lost"] != 0 and packed["path"].endswith("packed")
    assert merged["verdict"] == "ok" and merged["runtimes"][0]["verdict"] == "fail"
    assert failed(table) == ["packed", "merged in vLLM"]
    assert any("is not the model that was trained" in line for line in shipped.said)
    assert told(table)[0] == "merged in vLLM: fail: it stopped."
    shown = export_table(table)
    assert "packed, merged in vLLM: not the model that was trained" in shown and "− trained's" in shown


def test_a_runtime_is_given_what_is_exact_once(shipped: Any) -> None:
    shipped.go("packed", "merged")
    (first, second) = shipped.asked
    assert first[-2] is second[-2] and first[-2].batch(0).dtype == torch.float32 and first[-1] == 1e-3


def test_what_is_rounded_to_few_bits_is_not_called_equal(shipped: Any) -> None:
    pytest.importorskip("gguf")
    (row,) = shipped.go("gguf:q4_0")["targets"]
    assert row["verdict"] == "rounded" and row["kl"] < 0.5 and f"{row['lost']:+.4f}" in export_table({"targets": [row]})
    assert "rounded is another model by design" in held_to({"targets": [row], "tolerance": 1e-3})


def test_a_failed_export_ends_a_job_with_code_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path, monkeypatch)
    work, pushed = house.work, list[str]()

    def failing(folder: RunFolder, stage: Stage) -> None:
        work(folder, stage)
        if stage.kind == "export":
            rows = json.loads((folder / "export.json").read_text())
            rows["targets"][0]["verdict"] = "fail"
            (folder / "export.json").write_text(json.dumps(rows))

    monkeypatch.setattr(job, "work", failing)
    monkeypatch.setattr(job.hub, "push", lambda path, name, *more: pushed.append(name) or {"url": name})
    monkeypatch.setattr(job.hub, "check", lambda to, *more: {name: name for name in to})
    with pytest.raises(VerificationFailed, match="adapter: not the model that was trained") as e:
        job.train(house.recipe("export.to=[adapter, merged]", "export.push_to_hub=true", "export.hub_model_id=me/x"))
    assert e.value.code == 6 and pushed == ["merged"] and house.told
    exported = job.export(house.recipe("export.to=[adapter, merged]"), ["adapter"])
    assert failed(exported) == ["adapter"] and [t["name"] for t in exported["targets"]] == ["merged", "adapter"]
