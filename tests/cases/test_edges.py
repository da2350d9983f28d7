"""The edge of the input: numbers of YAML 1.2, paths with ~ and variables, bytes that are no text, names of files in every error."""

from __future__ import annotations

import json

import pytest

import chatty
from finebits import job
from finebits.data.check import check
from finebits.data.error import DataError
from finebits.data.rows import joined, read
from finebits.recipe import Recipe, RecipeError

MODEL = "model: {model_name_or_path: m}\n"


@pytest.mark.parametrize(
    ("text", "words", "key", "wanted"),
    [
        ("data: {max_length: 0512}", (), "data.max_length", 512),
        ("training: {seed: 0042}", (), "training.seed", 42),
        ("training: {seed: 0o17}", (), "training.seed", 15),
        ("training: {seed: 0x1F}", (), "training.seed", 31),
        ("", ("training.max_steps=0100",), "training.max_steps", 100),
        ("training: {learning_rate: 1e-4}", (), "training.learning_rate", 1e-4),
        ("training: {learning_rate: .5}", (), "training.learning_rate", 0.5),
        ("export: {verify: FALSE}", (), "export.verify", False),
        ("output_dir: no", (), "output_dir", "no"),
        ("output_dir: 1_000", (), "output_dir", "1_000"),
        ("output_dir: 2026-11-27", (), "output_dir", "2026-11-27"),
        ("output_dir: 1:30", (), "output_dir", "1:30"),
        ("budget: {memory: 0700000}", (), "budget.memory", 700000),
    ],
)
def test_scalars_of_yaml_1_2(text, words, key, wanted):
    """yaml/pyyaml#107: YAML 1.1 reads these as octal, base 60, dates and booleans."""
    recipe = Recipe.parse(MODEL + text, "r.yaml", words)
    section, _, leaf = key.rpartition(".")
    found = getattr(getattr(recipe, section) if section else recipe, leaf)
    assert found == wanted and type(found) is type(wanted)
    assert Recipe.parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("training: {save_steps: 1:30}", "r.yaml:2:24   training.save_steps wants a whole number or a number, and '1:30' came"),
        ("training: {max_steps: 1_000}", "and '1_000' came"),
        ("export: {verify: yes}", "export.verify wants true or false, and 'yes' came"),
        ("export: {verify: off}", "did you mean false?"),
        ("training: {seed: " + "9" * 5000 + "}", "r.yaml:2:18   this is not YAML: a number of 5,000 digits is too long"),
        ("training: {learning_rate: .inf}", "training.learning_rate wants a finite number"),
        ("training: {seed: 1}\ntraining: {seed: 2}", "training is there twice, first in line 2"),
        ("a: &a 1\nb: *a", "a recipe holds no YAML aliases"),
        ("data: !!python/object:os.system {}", "a recipe holds no YAML tags"),
        ("output_dir: a\x00b", "r.yaml:2:14   this is not YAML: the character #x0000 is not allowed"),
        ('output_dir: "a\\0b"', "the path holds the character NUL"),
        ('output_dir: "\\ud83d"', "output_dir"),
        ("output_dir: $NOT_SET_ANYWHERE/x", "output_dir: the environment has no variable NOT_SET_ANYWHERE"),
        ("x: " + "[" * 5000, "values lie more than 100 deep in each other"),
        ("adapter: {exclude_modules: '*'}", "adapter.exclude_modules: '*' is not a regular expression: nothing to repeat"),
        ("adapter: {rank_pattern: {'([': 4}}", "adapter.rank_pattern: '([' is not a regular expression: unterminated"),
        ("adapter: {layers_pattern: ['(h']}", "adapter.layers_pattern: '(h' is not a regular expression: missing )"),
    ],
)
def test_what_cannot_be_read_is_said_at_its_place(text, says):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(MODEL + text, "r.yaml")
    assert says in str(caught.value)


def test_paths_are_written_out(tmp_path, monkeypatch):
    """huggingface/transformers#10628: a folder named ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "data"))
    text = "model: {model_name_or_path: ~/m}\ndata: {datasets: [{path: $WHERE/a.jsonl}], held_out: {path: '${WHERE}/b.jsonl'}}\n"
    recipe = Recipe.parse(text, "r.yaml", ["output_dir=~/x"])
    assert recipe.model.model_name_or_path == f"{tmp_path}/m" and recipe.output_dir == f"{tmp_path}/x"
    assert [recipe.data.datasets[0].path, recipe.data.held_out.path] == [f"{tmp_path}/data/a.jsonl", f"{tmp_path}/data/b.jsonl"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a$b").mkdir()
    assert Recipe.parse(MODEL + "output_dir: a$b").output_dir == "a$b"  # it is there as it is written


def test_an_error_names_the_file_of_its_row(tmp_path):
    good, bad = chatty.rows(2), chatty.rows(2)
    bad[1]["messages"][1]["name"] = "Ann"
    files = [read(chatty.written(tmp_path / name, rows)) for name, rows in (("a.jsonl", good), ("b.jsonl", bad))]
    problem = next(p for p in check(joined(files), chatty.tokenizer(), 64).problems if p.level == "fail")
    assert problem.lines == (f"{tmp_path}/b.jsonl:2",) and 'has the key "name", which the chat template does not read' in problem.message
    (tmp_path / "t.txt").write_text("a text")
    with pytest.raises(DataError, match=r"mixes messages rows \(.*b.jsonl\) and text rows \(.*t.txt\)"):
        joined([*files, read(tmp_path / "t.txt")])


def test_marks_of_byte_order_and_line_ends_of_windows(tmp_path):
    """huggingface/datasets#8241, and two such files put one behind the other."""
    line = json.dumps(chatty.rows(1)[0]).encode()
    (tmp_path / "данные 😀.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n\xef\xbb\xbf" + line + b"\r\n")
    assert [r.line for r in read(tmp_path / "данные 😀.jsonl")] == [1, 3]
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfmodel:\r\n  model_name_or_path: m\r\noutput_dir: x y\r\n")
    assert Recipe.load(tmp_path / "r.yaml").output_dir == "x y"


def test_the_gate_of_the_job_knows_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(chatty.recipe(tmp_path), ["data.held_out=null"])
    rows = chatty.rows(3)
    rows[1]["messages"][1]["content"] = "hi \ud83d"
    chatty.written(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError, match=r"d.jsonl:2: turn 2 holds \\ud83d, half of a character") as caught:
        job.check(recipe)
    assert caught.value.code == 4
    chatty.written(tmp_path / "d.jsonl", chatty.rows(8))
    assert job.check(recipe).rows == 6
