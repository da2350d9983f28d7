"""What a run would find missing too late is said before it begins."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from finebits.cli import main
from finebits.data.rows import DataError
from finebits.plan.base import Plan
from finebits.recipe import Recipe
from finebits.run import ready as module
from finebits.run.ready import NotReady, ready, roomy
from finebits.run.source import Source

Usage = namedtuple("Usage", "total used free")


def of(*changes):
    return Recipe.parse("model: {model_name_or_path: m}", overrides=changes)


def test_a_recipe_that_could_run_here(tmp_path):
    ready(of(f"output_dir={tmp_path}/a/b"))


def test_a_tracker_is_there(monkeypatch):
    with pytest.raises(NotReady, match="did you mean tensorboard"):
        ready(of("report_to=tensorbord"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for named in ("wandb", "[none, wandb]"):
        with pytest.raises(NotReady, match="the package wandb is not installed: pip install wandb"):
            ready(of(f"report_to={named}"))


def test_a_device_is_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NotReady, match="torch sees no CUDA device here"):
        ready(of("device=cuda"))
    ready(of("device=auto"))


def test_a_disk_has_room(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(9, 9, 3 << 20))
    with pytest.raises(NotReady, match=r"has 3 MiB free"):
        ready(of("output_dir=nowhere/at/all"))


def test_rows_that_are_not_there_say_what_makes_them(tmp_path):
    shipped = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    recipe = Recipe.load(shipped, [f"data.datasets.0.path={tmp_path}/no.jsonl"])
    with pytest.raises(DataError, match=r"no\.jsonl.*made by: python examples/stdlib_docstrings\.py") as caught:
        Source.of(recipe)
    assert caught.value.code == 2


def test_a_disk_has_room_for_what_the_plan_writes(monkeypatch):
    """By hand: two models, two checkpoints (one is written while one stays), and an adapter."""
    plan = Plan({}, memory={"linear weights": 700 << 20, "adapters": 10 << 20, "optimizer": 20 << 20})
    recipe = of("output_dir=nowhere", "export.to=[adapter]", "evaluation.compare=[zeros]")
    least = (2 * 710 + 2 * 30 + 10) << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(9, 9, least))
    roomy(recipe, plan)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(9, 9, least - 1))
    with pytest.raises(NotReady, match=r"models 1\.39 GiB, checkpoints 60 MiB, exports 10 MiB"):
        roomy(recipe, plan)


def test_a_file_of_rows_is_no_recipe(capsys):
    assert main(["plan", "--recipe", "my.csv"]) == 2
    assert "my.csv is a file of rows" in " ".join(capsys.readouterr().err.split())
