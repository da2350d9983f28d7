"""kill -9 at random points of a whole job: train, save, export, merge. benchmarks/killed.py does it at fifty."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

import chatty

FILE = Path(__file__).parents[2] / "benchmarks" / "killed.py"


@pytest.fixture(scope="module")
def killed() -> Any:
    spec = importlib.util.spec_from_file_location("killed", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not hasattr(os, "fork"), reason="jobs are forked")
@pytest.mark.parametrize("points", [2, pytest.param(8, marks=pytest.mark.every)])
def test_a_job_that_is_killed_ends_as_one_that_was_not(killed: Any, points: int, tmp_path: Path) -> None:
    chatty.recipe(tmp_path)
    assert not killed.trials(tmp_path, points, seed=points)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="jobs are forked")
def test_a_disk_that_fills_is_said_in_a_sentence_and_leaves_nothing_half_written(killed: Any, tmp_path: Path) -> None:
    """A limit on the size of files is what fills: the start's weights do not fit."""
    import resource

    chatty.recipe(tmp_path)

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (48 << 10, resource.RLIM_INFINITY))
        killed.job(tmp_path, "run")

    log = tmp_path / "log"
    assert killed.forked(small, log) == 1
    last = log.read_text().strip().splitlines()[-1]
    assert "CannotWrite: " in last and "cannot be written: files may not be so large there" in last
    assert not killed.broken(tmp_path / "run")
