"""finebits data without a recipe and with one: what is printed, what is written, what is refused."""

from __future__ import annotations

import json

import pytest

import chatty
from finebits.cli import main


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path / "home"))
    chatty.recipe(tmp_path)
    return tmp_path


def said(capsys):
    return capsys.readouterr().out


def test_rows_are_checked_against_a_model_without_a_recipe(place, capsys):
    chatty.written(place / "rows.jsonl", [*chatty.rows(6), {"messages": [{"role": "user", "content": "left alone"}]}])
    assert main(["data", "check", "rows.jsonl", "--model", "m", "--max-length", "64"]) == 4
    out = said(capsys)
    assert "1 row holds no assistant turn" in out and "--drop-incomplete" in out and not (place / "runs").exists()
    assert main(["data", "check", "rows.jsonl", "-m", "m", "--max-length", "64", "--drop-incomplete"]) == 0
    out = said(capsys)
    assert "1 incomplete row left out (line 7)" in out and "[[it is 0<|b|>]]" in out and "rows 6" in out
    assert main(["data", "preview", "rows.jsonl", "-m", "m", "--drop-incomplete", "--show", "2"]) == 0
    assert said(capsys).count("[[") == 2
    assert main(["data", "stats", "rows.jsonl", "-m", "m", "--drop-incomplete", "max_length=20", "--format", "json"]) == 0
    data = json.loads(said(capsys))["data"]
    assert data["rows"] == 6 and data["cut"][0]["max_length"] == 20 and data["cut"][0]["nothing_left"] == 6


def test_a_recipe_warns_of_held_out_rows_that_are_training_rows(place, capsys):
    assert main(["data", "check", "r.yaml", "packing=true"]) == 0
    out = said(capsys)
    assert "8 held-out rows say what a training row says" in out and "packing    8 rows in 8 packs of up to 64 tokens" in out
    held = json.loads((place / "run" / "data.json").read_text())
    assert held["packing"]["packs"] == 8 and "held_out_overlap" in {p["kind"] for p in held["problems"]}
    assert main(["data", "stats", "r.yaml", "--format", "json"]) == 0
    assert json.loads(said(capsys))["data"]["held_out_overlap"] == 8


def test_rows_are_converted_and_parted_and_nothing_is_written_over(place, capsys):
    (place / "a.csv").write_text("instruction,output\n" + "".join(f"say {i},it is {i % 9}\n" for i in range(20)))
    assert main(["data", "convert", "a.csv", "--to", "prompt_completion", "--out", "b.jsonl"]) == 0
    assert "a table with the columns instruction, output" in said(capsys)
    first = json.loads((place / "b.jsonl").read_text().splitlines()[0])
    assert first == {"prompt": [{"role": "user", "content": "say 0"}], "completion": [{"role": "assistant", "content": "it is 0"}]}
    assert main(["data", "split", "b.jsonl", "--share", "0.2", "seed=5", "--out-dir", "parts"]) == 0
    parts = [(place / "parts" / f"b.{name}.jsonl").read_text().splitlines() for name in ("train", "held_out")]
    assert [len(p) for p in parts] == [16, 4] and sorted(parts[0] + parts[1]) == sorted((place / "b.jsonl").read_text().splitlines())
    assert "held_out: {path: parts/b.held_out.jsonl}" in said(capsys)
    before = (place / "b.jsonl").read_bytes()
    for words in (["convert", "a.csv", "--out", "b.jsonl"], ["split", "b.jsonl", "--out-dir", "parts"]):
        assert main(["data", *words]) == 2
        assert "is there already: name another, or replace it with --overwrite" in capsys.readouterr().err
    assert (place / "b.jsonl").read_bytes() == before
    assert main(["data", "convert", "a.csv", "--out", "b.jsonl", "--overwrite"]) == 0
    assert json.loads((place / "b.jsonl").read_text().splitlines()[0]).keys() == {"messages"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["check", "d.jsonl"], "name the model that d.jsonl is for: --model MODEL"),
        (["check"], "name a recipe first"),
        (["convert", "d.jsonl"], "name the file to write"),
        (["convert", "d.jsonl", "--to", "alpaca", "--out", "x.jsonl"], "rows are converted to messages or prompt_completion; got 'alpaca'"),
        (["split", "d.jsonl", "--share", "1.5"], "--share is 1.5: it can be above 0 and below 1"),
        (["check", "no.jsonl", "--model", "m"], "the data set no.jsonl is not there"),
    ],
)
def test_wrong_usage_is_one_sentence(place, capsys, words, says):
    assert main(["data", *words]) == 2
    assert says in capsys.readouterr().err and not (place / "x.jsonl").exists()
