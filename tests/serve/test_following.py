"""The page of a run that is going: what it tells, when it ends, and who may look."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import finebits as fb  # noqa: E402
from finebits.plan.base import Plan  # noqa: E402
from finebits.runfolder import RunFolder  # noqa: E402
from finebits.serve import following  # noqa: E402
from listening import Listening  # noqa: E402

MIB = 2**20


def put(folder: Path, *events: dict, cut: str = "") -> None:
    path = folder / "runs" / "loftq" / "events.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write("".join(json.dumps(e) + "\n" for e in events) + cut)


def step(n: int, **more: float) -> dict:
    return {"t": 10.0 + 2 * n, "event": "step", "step": n, "total": 10, "loss": 3.0 - n / 10, "rss": 150 * MIB, **more}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(following, "PACE", 0.02)
    place = RunFolder(tmp_path / "run")
    plan = Plan({"layers.0.q": fb.Spec(fb.NF(4), adapter=fb.LoRA(4), init=fb.LoftQ())}, budget=400 * MIB, memory={"weights": 90 * MIB})
    plan.save(place.path / "plan.json")
    place.begin({}, "rows", plan, {})
    put(place.path, {"t": 9.0, "event": "phase", "name": "training", "baseline": 100 * MIB}, step(1), step(2))
    return place.path


def test_it_tells_how_the_run_goes(folder: Path) -> None:
    watch = following.Watch(folder)
    with RunFolder(folder).locked():
        said = watch.state()
        assert said["status"] == "running" and said["run"] == "loftq" and said["phase"] == "training"
        assert (said["step"], said["total"], said["left"], said["memory"], said["budget"]) == (2, 10, 16.0, 50 * MIB, 400 * MIB)
        assert said["loss"] == pytest.approx(2.85)
        put(folder, cut='{"t": 16.0, "event": "st')
        time.sleep(0.03)
        half = watch.state()
        assert half["step"] == 2 and half["version"] != said["version"]
        put(folder, cut='ep", "step": 3, "total": 10, "loss": NaN, "device": 7}\n')
        time.sleep(0.03)
        whole = watch.state()
        assert (whole["step"], whole["memory"], whole["left"]) == (3, 7, 14.0) and whole["loss"] == pytest.approx(2.85)
    time.sleep(0.03)
    assert watch.state()["status"] == "killed"


def test_a_file_that_begins_anew_is_read_anew(folder: Path) -> None:
    tail = following.Tail(folder / "runs" / "loftq" / "events.jsonl")
    assert [e["event"] for e in tail.new()] == ["phase", "step", "step"] and tail.new() == []
    tail.path.write_text("")
    assert tail.new() == []
    put(folder, step(1))
    assert [e["step"] for e in tail.new()] == [1]


def test_several_look_until_it_ends(folder: Path) -> None:
    place = RunFolder(folder)
    with place.locked():
        server = Listening(following.app(folder))
        address = server.url
        with urllib.request.urlopen(address, timeout=30) as answer:
            page = answer.read().decode()
        assert 'id="going"' in page and "connect-src 'self'" in page and 'id="memory"' in page and "Over time" in page
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.example"}), timeout=30)
        streams = [urllib.request.urlopen(f"{address}/events", timeout=30) for _ in range(2)]
        assert all(json.loads(stream.readline()[5:])["step"] == 2 for stream in streams)
        put(folder, step(3))
        place.finish()
        for stream in streams:
            told = [json.loads(line[5:]) for line in stream.read().splitlines() if line.startswith(b"data:")]
            assert told[-1]["status"] == "finished" and told[-1]["step"] == 3  # and nothing behind it
    server.end()
