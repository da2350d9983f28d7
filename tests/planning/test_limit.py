"""The parts of a job keep within memory that the system grants, on a model that does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finebits.meter import MALLOC

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "limit.py"


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts so on Linux alone")
def test_the_parts_fit_where_the_model_does_not(tmp_path: Path) -> None:
    """144 MiB of weights and 112 MiB, under the allocator's settings of a measured job: scored, measured; and refused whole."""
    sizes = "--sizes 512 1408 26 4096 --budget 112MiB --tokens 8 --parts full gradients whole".split()
    command = [sys.executable, str(BENCHMARK), str(tmp_path / "m"), *sizes]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | MALLOC
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
