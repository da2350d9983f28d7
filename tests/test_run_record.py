"""run.json says what a run is made of and on, who worked at it, and how it stands."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from finebits import job
from finebits.report.pace import Pace
from finebits.run.stage import StageFailed
from finebits.runfolder import RunFolder
from test_runfolder import House


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/finebits", "train", "r.yaml", "training.seed=7"])
    return House(tmp_path, monkeypatch)


def test_a_record_names_all_that_results_depend_on(house: House) -> None:
    job.train(house.recipe("training.seed=7"))
    record = RunFolder(house.root / "run").record()
    about, rows = record["about"], house.root / "d.jsonl"
    assert record["status"] == "finished" and record["settings"]["training"]["seed"] == about["seed"] == 7
    assert about["plan"] == record["plan"] and about["data"]["fingerprint"] == record["data"]
    assert about["model"]["name"] == f"{house.root}/m" and len(about["model"]["fingerprint"]) == 16
    assert (about["data"]["rows"], about["data"]["held_out"]) == (1, 1)
    sha = hashlib.sha256(rows.read_bytes()).hexdigest()
    assert [(f["use"], f["sha256"], f["bytes"]) for f in about["data"]["files"]] == [
        (use, sha, rows.stat().st_size) for use in ("train", "held out")
    ]
    assert {"finebits", "python", "torch", "transformers"} <= about["versions"].keys()
    assert about["machine"]["device"] == "cpu" and about["machine"]["cores"] >= 1 and about["machine"]["cpu"]
    (session,) = record["sessions"]
    assert session["command"] == "finebits train r.yaml training.seed=7" and session["exit"] == 0
    assert session["ended"] >= session["begun"] and session["seconds"] >= 0 and record["pace"]["steps"] == 0


def test_while_it_runs_and_when_it_is_stopped(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen, real = RunFolder(house.root / "run"), [], house.work

    def work(*given) -> None:
        seen.append((folder.status, folder.record()["sessions"][-1]["exit"]))
        real(*given)

    monkeypatch.setattr(job, "work", work)
    house.fails = "zeros"
    with pytest.raises(KeyboardInterrupt):
        job.train(house.recipe())
    assert set(seen) == {("running", None)}
    assert folder.status == "interrupted" and folder.record()["sessions"][0]["exit"] == 130
    house.fails = ""
    job.train(house.recipe(), resume=True)
    assert folder.status == "finished" and [s["exit"] for s in folder.record()["sessions"]] == [130, 0]
    job.export(house.recipe(), ["merged"], False)
    assert folder.status == "finished" and len(folder.record()["sessions"]) == 3


def test_what_failed_says_with_which_words(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*given) -> None:
        raise StageFailed("zeros was killed by the system", 5)

    monkeypatch.setattr(job, "work", work)
    with pytest.raises(StageFailed):
        job.train(house.recipe())
    record = RunFolder(house.root / "run").record()
    assert record["status"] == "failed" and record["sessions"][0]["exit"] == 5
    assert record["sessions"][0]["said"] == "zeros was killed by the system" and not record["finished"]


def test_a_run_that_was_killed_is_seen_to_be(house: House) -> None:
    job.train(house.recipe())
    folder = RunFolder(house.root / "run")
    folder.note(status="running", finished=False)
    assert folder.status == "killed"
    with folder.locked():
        assert folder.status == "running"


def test_equal_parts_are_taken_over(house: House) -> None:
    job.train(house.recipe())
    first, house.done = house.done, []
    job.train(house.recipe("training.weight_decay=0.1", f"output_dir={house.root}/two"), like=[house.root / "run"])
    assert first == ["full", "zeros/start", "zeros", "export"] and house.done == ["zeros", "export"]
    line = json.loads((house.root / "two" / "runs" / "full" / "events.jsonl").read_text())
    assert line["name"] == f"taken over from {house.root}/run"
    house.done = []
    job.train(house.recipe("evaluation.limit=1", f"output_dir={house.root}/three"), like=[house.root / "run", house.root / "two"])
    assert house.done == first, "other held-out rows make other scores"


def test_the_pace_leaves_out_what_was_no_training() -> None:
    steps = [{"event": "step", "t": 10.0 + i, "tokens": 5.0, "seen": 20.0} for i in range(3)]
    between = [{"event": "phase", "t": 500.0, "name": "training"}, {"event": "step", "t": 501.0, "tokens": 5.0, "seen": 20.0}]
    pace = Pace.of([{"event": "phase", "t": 9.0, "name": "training"}, *steps, *between])
    assert (pace.steps, pace.seconds, pace.per_second(pace.tokens)) == (4, 4.0, 20.0)
    older = Pace.of([{"event": "phase", "t": 0.0}, {"event": "step", "t": 1.0, "tokens": 5.0}])
    assert older.tokens is None and older.per_second(older.trained) == 5.0
