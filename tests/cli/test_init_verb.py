"""A recipe to begin with: templates and questions."""

import io
import sys
from pathlib import Path

import pytest

from finebits.cli import main
from finebits.recipe import Recipe, templates


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal


@pytest.mark.parametrize("kind", templates.kinds())
def test_a_template_loads_and_explains_itself(kind, capsys):
    assert main(["init", "--template", kind]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Next: finebits plan recipe.yaml"
    text = Path("recipe.yaml").read_text()
    assert Recipe.load("recipe.yaml").model.model_name_or_path == templates.MODEL and text.count("# ") > 15


def test_pairs_have_a_template():
    assert main(["init", "--template", "preference"]) == 0
    objective = Recipe.load("recipe.yaml").objective_value()
    assert objective is not None and objective.together == 2


def test_values_are_written_into_it():
    assert (
        main(["init", "m", "rows.jsonl", "--budget", "4GiB", "--paper", "dora", "adapter.init=zeros", "max_formats=2", "--out", "a.yaml"])
        == 2
    )
    words = ["--budget", "4GiB", "--paper", "dora", "adapter.init=zeros", "--max-formats", "2", "--held-out", "h.jsonl", "--out", "a.yaml"]
    assert main(["init", "m", "rows.jsonl", *words]) == 0
    recipe = Recipe.load("a.yaml")
    assert recipe.budget.memory == "4GiB" and recipe.adapter.paper == "dora" and recipe.quantization.constraints.max_formats == 2
    assert recipe.output_dir == "runs/rows" and recipe.data.held_out is not None and recipe.data.held_out.path == "h.jsonl"


def test_what_is_there_is_left_alone(capsys):
    Path("recipe.yaml").write_text("mine")
    assert main(["init"]) == 2 and Path("recipe.yaml").read_text() == "mine"
    assert "is not overwritten: name another file with --out" in capsys.readouterr().err
    assert main(["init", "--template", "stf", "--out", "b.yaml"]) == 2
    assert "'stf' came" in capsys.readouterr().err and not Path("b.yaml").exists()


def test_a_terminal_is_asked(monkeypatch, capsys):
    stdin = io.StringIO("text\nm\nbook.txt\n4GiB\n")
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["init"]) == 0
    shown, recipe = capsys.readouterr(), Recipe.load("recipe.yaml")
    assert "Model" in shown.err and "Model" not in shown.out
    assert recipe.model.model_name_or_path == "m" and recipe.budget.memory == "4GiB" and recipe.output_dir == "runs/book"
    assert not recipe.data.assistant_only_loss and recipe.data.datasets[0].path == "book.txt"
