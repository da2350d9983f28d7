"""finebits doctor: what it says, what it does not, and what may be pasted."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finebits import kernels
from finebits.cli import main
from finebits.kernels import reference
from finebits.run import bench, machine

ROOT = Path(__file__).parents[2]


def rows(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[dict[str, str]]:
    assert main(["doctor", *words, "--format", "json"]) == code
    return json.loads(capsys.readouterr().out)["data"]


def test_ranges_begin_where_pyproject_does_and_end_where_the_tests_are() -> None:
    """make supported runs the tests on the floors of the extras hf and train; constraints.txt is what all others run with."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    floors = dict(line.split(">=") for extra in ("hf", "train") for line in extras[extra] if ">=" in line and "psutil" not in line)
    assert {k: machine.TESTED[k][0] for k in floors} == floors
    held = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert {k: newest for k, (_, newest) in machine.TESTED.items()} == {k: ".".join(held[k].split(".")[:2]) for k in machine.TESTED}
    assert all(machine.numbers(a) <= machine.numbers(f"{b}.999") for a, b in machine.TESTED.values())


@pytest.mark.parametrize(
    ("version", "mark", "said"),
    [
        ("5.23.4", "ok", "tested 5.20.2 - 5.23"),
        ("5.24.0", "warn", "newer than any that was tested (5.20.2 - 5.23)"),
        ("5.1.0", "fail", "needs 5.20.2 or newer"),
        (None, "warn", "it is part of finebits[hf]"),
    ],
)
def test_versions(version: str | None, mark: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.version
    monkeypatch.setattr(machine, "version", lambda package: version if package == "transformers" else real(package))
    (row,) = [r for r in rows(capsys, code=1 if mark == "fail" else 0) if r["what"] == "transformers"]
    assert row["mark"] == mark and said in row["found"]
    fixes = {"fail": 'pip install -U "transformers>=5.20.2"', "warn": '"transformers>=5.20.2,<5.24"' if version else "'finebits[hf]'"}
    assert fixes.get(mark, "") in row.get("fix", "")


def test_one_line_mends_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.version
    monkeypatch.setattr(machine, "version", lambda package: "0.1" if package in ("trl", "peft") else real(package))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert ' all of it: pip install -U "trl>=1.5.1" "peft>=0.21"' in shown and " 2 problems" in shown


def test_a_kernel_that_is_wrong_is_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    own = {k: getattr(reference, k) for k in ("dequantize", "quantize")}
    wrong = SimpleNamespace(**own, name="wrong", linear=lambda *given: reference.linear(*given) * 1.1)
    monkeypatch.setattr(kernels, "_chosen", lambda *given: wrong)
    (row,) = [r for r in rows(capsys, code=1) if r["what"] == "self-test"]
    assert "linear at 2 bits by 1.0e-01 (wrong)" in row["found"] and "FINEBITS_KERNELS=reference" in row["fix"]


def test_what_runs_by_the_reference_is_held_against_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEBITS_KERNELS", "reference")
    (row,) = [r for r in rows(capsys) if r["what"] == "self-test"]
    assert "nothing to hold against it" in row["found"] and bench.agreement(torch.device("cpu")) == []


def test_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(r["what"] == "bench" for r in rows(capsys))
    monkeypatch.setitem(bench.SIDE, "cpu", 128)
    lines = [r["found"] for r in rows(capsys, "--bench") if r["what"] == "bench"]
    assert len(lines) == len(bench.TOKENS) + 1 and all(re.search(r"128 x 128, 4 bits.* ms, dense .* ms, ratio \d", line) for line in lines)


def test_a_full_disk_and_a_busy_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    monkeypatch.setattr(machine, "cores", lambda: 0)
    found = {r["what"]: r for r in rows(capsys)}
    assert found["this folder"]["mark"] == "warn" and "1 GiB free" in found["this folder"]["found"]
    assert found["threads"]["mark"] == "warn" and "OMP_NUM_THREADS" in found["threads"]["fix"]


def test_nothing_private_is_pasted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    home = tmp_path / "home" / "annabelle"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setattr(getpass, "getuser", lambda: "annabelle")
    monkeypatch.setattr(socket, "gethostname", lambda: "annas-laptop")
    monkeypatch.setattr(machine, "processor", lambda: f"annas-laptop {home}/cpu hf_abcdefghijklmnop /home/somebody/x")
    monkeypatch.chdir(home / "work")
    assert main(["doctor", "--paste"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("```text\n") and shown.endswith("```\n") and "HOST ~/cpu … /home/USER/x" in shown and "HF_HOME" in shown
    assert not any(word in shown for word in ("annabelle", "annas", "hf_abc", "somebody", str(tmp_path), "\x1b"))
    assert "transformers" in shown and "self-test" in shown
