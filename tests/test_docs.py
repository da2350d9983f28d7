"""The map of the house is true: what it names is there, all of the package is on it, and its patches apply and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "finebits"
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
RUN = """
import doctest, importlib, sys, torch, finebits as fb
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"fb": fb, "torch": torch}).failed == 0, name
    if name.startswith("finebits.report.panels."):
        from finebits.report.page import PANELS
        assert module in PANELS
sys.argv = ["finebits", "--help"]
from finebits.cli import main
main()
"""


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_what_is_named_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`([\w./-]+(?:/|\.py|\.c|\.h|\.md|\.toml))`", text)
    assert len(named) > 5
    assert not [path for path in named if path != "base.py" and not any((at / path).exists() for at in (ROOT, PACKAGE))]


def test_all_of_the_package_is_on_the_map() -> None:
    picture = MAP.split("```")[1]
    entries = {e.name + "/" * e.is_dir() for e in PACKAGE.iterdir() if e.is_dir() and e.name != "__pycache__" or e.suffix == ".py"}
    drawn = set(re.findall(r"[\w.]+(?:\.py|/)(?= |$)", picture, re.M))
    missing = entries - {"__init__.py"} - drawn
    gone = {name for name in drawn - entries if not (PACKAGE / "kernels" / name).exists()}
    assert not missing and not gone


def test_the_patches_apply_and_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
    patches = re.findall(r"^```diff\n(.*?)^```", MAP, re.S | re.M)
    assert patches
    for patch in patches:
        subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=patch, text=True, check=True)
    new = re.findall(r"^--- /dev/null\n\+\+\+ b/src/(\S+)\.py", MAP, re.M)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    command = [sys.executable, "-W", "ignore", "-c", RUN, *(name.replace("/", ".") for name in new)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    verbs = [Path(name).stem for name in new if name.startswith("finebits/cli/")]
    assert verbs and all(re.search(rf"\b{verb}\b", done.stdout) for verb in verbs)
