from __future__ import annotations

from pathlib import Path

import pytest
from run_folder import llama_plan, write_run

from finebits.plan.base import Plan


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole run folder, read only."""
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="session")
def plan() -> Plan:
    return llama_plan()
