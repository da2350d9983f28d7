"""One page of several runs, and the panel that says what it takes to make a run again."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from run_folder import SCRIPT, llama_plan, put
from test_report_page import Page
from test_runs import write

from finebits.cli import main
from finebits.errors import Invalid
from finebits.report import compare
from finebits.report.page import run_page
from finebits.runfolder import RunFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: a plain one, one at another rate on an older torch, one over another plan that was measured worse."""
    place = tmp_path_factory.mktemp("compared")
    a = write(place / "a")
    b = write(place / "b", rate=1e-3, versions={"finebits": "0.1.0", "torch": "2.6.0"})
    c = write(place / "c")
    plan = llama_plan(2)
    points = [{"peak": plan.peak * k // 4, "loss": 2.0 ** (-k)} for k in (3, 4, 5)]
    replace(plan, budget=300 << 20, solver=plan.solver | {"pareto": points}).save(c / "plan.json")
    told = json.loads((c / "evaluation.json").read_text())
    for entry in told["entries"]:
        entry["loss"] += 0.2 * (entry["key"] == "loftq")
    put(c / "evaluation.json", told)
    return [a, b, c]


@pytest.fixture(scope="module")
def html(runs: list[Path]) -> str:
    return compare.page(runs)


def tables_of(html: str) -> dict[str, list[list[str]]]:
    """Rows of every table, heads left out; a cell is its raw value where that is not what is shown."""
    return {name: [row for row in rows if row] for name, rows in Page(html).tables.items()}


def test_it_is_small_whole_and_asks_for_nothing(html: str) -> None:
    page = Page(html)
    assert len(html.encode()) < 400_000 and page.handlers == [] and all(v.startswith("#") for _, _, v in page.links)
    assert "connect-src" not in html and [
        i for i in page.ids if i in ("memory", "choice", "loss", "evaluation", "settings", "reproduce")
    ] == [
        "memory",
        "choice",
        "loss",
        "evaluation",
        "settings",
        "reproduce",
    ]


def test_every_chart_has_its_table(html: str) -> None:
    tables = tables_of(html)
    assert {"memory", "pareto", "end of every run", "loss of every step", "evaluation", "settings", "made on"} <= tables.keys()
    assert [row[0] for row in tables["memory"]] == ["a", "b", "c"] and tables["memory"][2][2] == str(300 << 20)
    assert [row[0] for row in tables["end of every run"]] == ["a", "b", "c"]
    kinds = [(row[0], row[3]) for row in tables["pareto"]]
    assert kinds.count(("a", "chosen")) == 1 and kinds.count(("c", "")) == 3 and kinds.count(("b", "measured")) == 1
    assert tables["settings"] == [["training.learning_rate", "0.0002", "0.001", "0.0002"]]


def test_the_unquantized_model_is_told_once(html: str) -> None:
    names = [row[0] for row in tables_of(html)["evaluation"]]
    assert names == ["full precision, untuned", *(f"{n} {w}" for n in "abc" for w in ("start, untuned", "tuned"))]


def test_versions_pace_and_commands_stand_beside_each_other(html: str) -> None:
    rows = {row[0]: row[1:] for row in tables_of(html)["made on"]}
    assert rows["torch"] == ["2.13.0", "2.6.0", "2.13.0"] and rows["wall time"] == ["4 min 0 s"] * 3
    assert rows["commands"] == ["finebits train r.yaml"] * 3 and rows["processor"][0].startswith("Some CPU, 2 cores")
    assert rows["pace"] == ["8,533.3 trained tokens/s"] * 3 and rows["held-out loss"] == ["1.4230", "1.4230", "1.6230"]


def test_the_best_is_said_only_of_what_compares(runs: list[Path], html: str, tmp_path: Path) -> None:
    assert "lowest held-out loss" in html and "levels do not compare" not in html
    other = write(tmp_path / "other")
    RunFolder(other).note(data="other rows")
    shown = compare.page([runs[0], other])
    assert "lowest held-out loss" not in shown and "not scored on the same rows" in shown


def test_what_a_stranger_wrote_is_text(runs: list[Path], tmp_path: Path) -> None:
    evil = shutil.copytree(runs[0], tmp_path / f"x{SCRIPT.replace('/', '')}")
    record = json.loads((evil / "run.json").read_text())
    record["settings"]["training"]["learning_rate"] = SCRIPT
    record["about"]["machine"]["cpu"] = SCRIPT
    record["sessions"][0]["command"] = SCRIPT
    put(evil / "run.json", record)
    for shown in (compare.page([runs[0], evil]), run_page(evil)):
        assert "<script>alert" not in shown and Page(shown).scripts == 2


def test_runs_that_have_little_to_say(runs: list[Path], tmp_path: Path) -> None:
    llama_plan(2).save(tmp_path / "planned" / "plan.json")
    llama_plan(2).save(tmp_path / "planned too" / "plan.json")
    page = Page(compare.page([tmp_path / "planned", tmp_path / "planned too"]))
    assert "evaluation" not in page.ids and "loss" not in page.ids and "memory" in page.ids
    Page(compare.page([runs[0], tmp_path / "planned"]))


def test_wrong_numbers_of_runs(runs: list[Path]) -> None:
    with pytest.raises(Invalid, match="2 to 6 runs, and 1 came"):
        compare.page(runs[:1])
    with pytest.raises(Invalid, match="named twice"):
        compare.page([runs[0], runs[0]])


def test_the_command(runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", "--compare", *map(str, runs)]) == 0
    assert capsys.readouterr().out.strip() == f"wrote {os.path.realpath(runs[0].parent)}/comparison.html"
    mine = tmp_path / "mine.html"
    mine.write_text("<p>")
    assert main(["report", "--compare", *map(str, runs), "--out", str(mine)]) == 2 and mine.read_text() == "<p>"
    assert main(["report", *map(str, runs)]) == 2 and "--compare makes one page" in capsys.readouterr().err


def test_the_page_of_a_run_says_what_it_takes_to_make_it_again(runs: list[Path]) -> None:
    html = run_page(runs[0])
    tables = tables_of(html)
    assert tables["versions"] == [["finebits", "0.1.0"], ["torch", "2.13.0"]]
    assert tables["commands"][0][0] == "finebits train r.yaml" and math.isclose(float(tables["commands"][0][1]), 240)
    assert tables["files"] == [["d.jsonl", "train", "9", "ab"]]
    for words in ("Wall time", "4 min 0 s", "trained tokens/s", "Some CPU, 2 cores, 2 threads of torch, AVX2", "8 GiB", "0.1.2"):
        assert words in html, words
