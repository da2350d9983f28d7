"""The test house: uninitialised memory holds NaN, shapes in signatures are checked (up to the
second floor; above it, strangers' data comes in and is refused in sentences), every test starts from the same seed.

Shape checks do not survive `torch.compile(fullgraph=True)`; tests that compile, or that start ranks, run as plain processes (`plain` below).
Which warnings are errors is said in pyproject.toml.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping

import shapes

if os.environ.get("FINEBITS_SHAPES", "on") == "on":
    # kernels.cuda is not among them: a wrapped function of Triton's language is compiled with the wrapper's globals.
    floors = "formats stats qtensor kernels.table kernels.reference kernels.cpu linalg blocks quantizers init adapters build train"
    floors += " tasks.causal_lm losses rules optim plan api evaluate"
    shapes.install([f"finebits.{name}" for name in floors.split()])

import gc
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
SRC = HERE.parent / "src"

gc.disable()  # until all is collected
torch.set_num_threads(1)
settings.register_profile("laws", derandomize=True, deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
settings.load_profile("laws")


# torch.manual_seed has every kind of accelerator note the stack that it was called from, should one be started later: a millisecond a test.
seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def same_ground() -> Iterator[None]:
    """Fixed seeds, and NaN (or the largest integer) in whatever torch.empty, new_empty and empty_like hand out."""
    random.seed(0)
    numpy.random.seed(0)
    seed(0)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No run-time checks of signatures: for tests of our own errors about values that a type would already exclude."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def plain() -> Callable[..., str]:
    """Run a script of this folder in a process of its own, without shape checks and without poison; gives its output."""

    def run(script: str, *args: object, timeout: int = 240) -> str:
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")]), "FINEBITS_SHAPES": "off"}
        command = [sys.executable, str(HERE / script), *map(str, args)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            pytest.fail(f"{script} {' '.join(map(str, args))} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done.stdout

    return run


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: looking through it again and again for garbage would take a good part of the time."""
    gc.freeze()
    gc.enable()
