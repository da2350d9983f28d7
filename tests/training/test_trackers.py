"""Trackers of transformers see a whole run: loss, learning rate and held-out loss under transformers' usual names, step by step what the run's
own events say. Stages run one after the other in this process; a tracker that is not installed is stood in for."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # chatty
pytest.importorskip("trl")

from transformers import TrainerCallback
from transformers.integrations import integration_utils

import chatty
from finebits import job
from finebits.recipe import Recipe
from finebits.run import ready
from finebits.run.__main__ import make

Series = dict[str, dict[int, float]]  # {name: {step: value}}


class StandIn(TrainerCallback):
    """Writes what any tracker is given, under the names that transformers gives it there."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        with Path(args.output_dir, "tracked.jsonl").open("a") as f:
            f.write(json.dumps([state.global_step, integration_utils.rewrite_logs(logs)]) + "\n")


def of_stand_in(run: Path) -> Series:
    found: Series = {}
    for line in (run / "checkpoints" / "tracked.jsonl").read_text().splitlines():
        step, values = json.loads(line)
        for name, value in values.items():
            found.setdefault(name, {})[step] = value
    return found


def of_tensorboard(run: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (run / "checkpoints" / "runs").glob("*/events.out.tfevents.*")
    seen = EventAccumulator(str(file)).Reload()
    return {name: {e.step: e.value for e in seen.Scalars(name)} for name in seen.Tags()["scalars"]}


@pytest.mark.parametrize("tracker", ["trackio", "tensorboard"])
def test_a_tracker_sees_what_the_events_say(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(job, "work", make)
    if tracker == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            pytest.skip("tensorboard is not installed: its event file is not read back")
        read = of_tensorboard
    else:  # a name that the recipe, its checks and transformers know, and nothing behind it
        read = of_stand_in
        monkeypatch.setitem(ready.TRACKERS, tracker, "json")
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, tracker, StandIn)
        monkeypatch.setattr(integration_utils, f"is_{tracker}_available", lambda: True)
    chatty.recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    more = [
        "training={max_steps: 4, per_device_train_batch_size: 2, learning_rate: 1e-3, logging_steps: 1, eval_strategy: steps, eval_steps: 2}",
        f"training.report_to={tracker}",
        "export.to=[]",
        "evaluation.full_precision=false",
    ]
    job.train(Recipe.load("r.yaml", more))
    run = tmp_path / "run" / "runs" / "zeros"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    of = lambda kind, key: {e["step"]: e[key] for e in events if e["event"] == kind}  # noqa: E731
    seen = read(run)
    assert seen["train/loss"] == pytest.approx(of("step", "loss"), rel=1e-3)  # transformers rounds what it hands on
    assert seen["train/learning_rate"] == pytest.approx(of("log", "learning_rate"), rel=1e-5)
    assert [*seen["train/learning_rate"]] == [1, 2, 3, 4] and seen["train/learning_rate"][1] > seen["train/learning_rate"][4]
    assert seen["eval/loss"] == pytest.approx(of("eval", "loss"), rel=1e-5) and [*seen["eval/loss"]] == [2, 4]
    assert set(seen["train/grad_norm"]) == {1, 2, 3, 4}
