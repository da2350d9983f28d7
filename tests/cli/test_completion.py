"""What a shell asks of the command while somebody types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finebits.cli import main

SRC = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize(("typed", "offered"), [("finebits pl", ["plan"]), ("finebits runs w", ["why"])])
def test_verbs_and_their_parts_are_offered(typed: str, offered: list[str]) -> None:
    asked = {"_FINEBITS_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    env = os.environ | asked | {"PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-m", "finebits"], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == offered, done.stderr


def test_it_can_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "--install-completion" in capsys.readouterr().out
