"""Every cause from a log of its kind, and nothing from a healthy one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finebits.report.causes import Cause, diagnose
from finebits.report.summary import Summary

Log = list[dict[str, Any]]
RECIPE = {"training": {"learning_rate": 2e-4, "max_grad_norm": 1.0}, "data": {"datasets": [{"path": "d.jsonl"}]}}
DATA = {"rows": 500, "tokens": 50_000, "trained_tokens": 20_000, "truncated": 3, "max_length": 512, "lengths": {"max": 600}, "problems": []}


def log(loss: Callable[[float], float], steps: int = 60, noise: float = 0.04, norm: float = 0.6) -> Log:
    """The events of a run whose loss is `loss` of the share of the steps that are done."""
    draw, events = random.Random(3), [{"t": 0.0, "event": "phase", "name": "training"}]
    for step in range(1, steps + 1):
        at = {"t": 2.0 * step, "step": step}
        events.append(
            {**at, "event": "step", "total": steps, "loss": loss(step / steps) + draw.gauss(0, noise), "lr": 2e-4, "tokens": 90.0}
        )
        events.append({**at, "event": "log", "grad_norm": norm + 0.3 * draw.random()})
    return events


def falling(share: float) -> float:
    return 1.4 + 0.9 * math.exp(-5 * share)


def scores(full: float = 2.0, start: float = 2.2, tuned: float = 1.5, rows: int = 64) -> dict[str, Any]:
    entries = [
        {"key": key, "name": key, "stage": stage, "loss": v, "intervals": {"loss": [v - 0.05, v + 0.05]}}
        for key, stage, v in (("full", "start", full), ("qera_start", "start", start), ("qera", "tuned", tuned))
    ]
    return {"rows": rows, "entries": entries, "main": "qera"}


def seen(**changes: Any) -> list[Cause]:
    """What is said of a healthy run with these changes."""
    record = {"settings": RECIPE, "sessions": [{"command": "finebits train r.yaml", "seconds": 120.0, "exit": 0}], "about": {}}
    plan = {"budget": 400 << 20, "memory": {"all": 300 << 20}, "costs": {"a": {"shape": [8, 128], "bytes": 448}}}
    memory = {"measured_peak": 306 << 20, "rows": [{"phase": "load", "planned": 200 << 20, "measured": 190 << 20}]}
    given: dict[str, Any] = {"record": record, "plan": plan, "data": DATA, "memory": memory, "evaluation": scores(), "events": log(falling)}
    return diagnose(Summary(Path("runs/a"), **({"status": "finished", "main": "qera"} | given | changes)))


def only(kind: str, said: str, **changes: Any) -> Cause:
    """The one cause that is found."""
    causes = seen(**changes)
    assert [c.kind for c in causes] == [kind], causes
    assert said in f"{causes[0].what}: {causes[0].evidence}: {causes[0].fix}", causes[0]
    return causes[0]


def recipe(**training: Any) -> dict[str, Any]:
    return {"settings": RECIPE | {"training": RECIPE["training"] | training}, "about": {}}


@pytest.mark.parametrize("steps", [1, 5, 12, 60, 2000])
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_a_healthy_run_gives_no_finding(steps: int, noise: float) -> None:
    assert seen(events=log(falling, steps, noise)) == []


def test_an_empty_folder_gives_none_either() -> None:
    assert diagnose(Summary(Path("a"), "planned")) == []


def test_a_loss_that_is_no_number() -> None:
    only("not_finite", "step 41", events=log(lambda s: math.nan if s > 0.67 else 2.0)[:-6])
    said = "the loss is not finite at step 3 of 60"
    events = log(falling, 60)[:5] + [{"t": 9.0, "event": "phase", "name": said}]
    assert only("not_finite", said, events=events).sure == "fail"


def test_a_rate_that_is_too_high() -> None:
    cause = only("rising", "0.0002", events=log(lambda s: 2.0 + 3 * s))
    assert "6.7e-05" in cause.fix and cause.sure == "fail"
    cut = recipe(max_grad_norm=0)
    assert "max_grad_norm" in only("rising", "learning rate", events=log(lambda s: 2.0 + 3 * s), record=cut).fix


def test_spikes() -> None:
    events = log(falling)
    events[61]["loss"] = 9.0
    only("spikes", "1 step of 60; step 31 has 9.00", events=events)


def test_a_rate_that_is_too_low() -> None:
    flat = log(lambda s: 2.0 - 0.01 * s, noise=0.001)
    only("flat", "learning rate of 0.0002", events=flat, evaluation=scores(tuned=2.19))
    assert seen(events=flat) == [], "the held-out rows show that it learned"
    assert seen(events=flat[:40], evaluation=scores(tuned=2.19)) == [], "twenty steps are none to judge by"


def test_rows_learned_by_heart() -> None:
    held = [{"t": 0.0, "event": "eval", "step": s, "loss": v} for s, v in ((20, 1.2), (40, 1.35))]
    cause = only("overfitted", "held-out loss 1.200 at step 20 and 1.500 at the end", events=log(falling) + held)
    assert "max_steps=20" in cause.fix


def test_a_model_that_got_worse() -> None:
    kinds = {c.kind: c for c in seen(evaluation=scores(start=2.2, tuned=2.4))}
    assert kinds.keys() == {"worse", "overfitted"} and kinds["worse"].sure == "fail"


def test_bits_that_are_too_few() -> None:
    assert only("far_start", "3.200 at the start at 3.50 bits (60% more)", evaluation=scores(start=3.2)).sure == "info"
    assert only("far_start", "2.600 tuned", evaluation=scores(start=3.2, tuned=2.6)).sure == "warn"


def test_gradients_that_are_always_cut() -> None:
    only("clipped", "100% of 60 gradients are longer than training.max_grad_norm 1", events=log(falling, norm=4.0))
    assert seen(events=log(falling, norm=4.0), record=recipe(max_grad_norm=0)) == []


def test_rows_that_teach_nothing() -> None:
    problem = {"kind": "no_trained_token", "level": "fail", "message": "17 rows without any trained token", "fix": "give them an answer"}
    only("untrained", "17 rows", data=DATA | {"problems": [problem]})
    only("untrained", "200 of 50,000 tokens are trained (0.4%)", data=DATA | {"trained_tokens": 200})
    events = log(falling)
    events[3]["tokens"] = 0.0
    only("untrained", "1 of 60 steps saw no trained token, the first of them step 2", events=events)


@pytest.mark.parametrize(
    ("kind", "level", "said"),
    [("end_of_turn", "fail", "ends an answer is not trained"), ("generation_prompt", "warn", "asks otherwise than it teaches")],
)
def test_a_template_that_does_not_fit(kind: str, level: str, said: str) -> None:
    cause = only("template", said, data=DATA | {"problems": [{"kind": kind, "level": level, "message": "40 rows …", "fix": ""}]})
    assert cause.sure == level and cause.evidence == "40 rows …" and cause.fix == "use another chat template"


def test_rows_that_are_cut() -> None:
    only("truncated", "120 of 500 rows are cut at 512 tokens: raise data.max_length (600 holds", data=DATA | {"truncated": 120})


def test_too_few_rows_to_judge_by() -> None:
    only("few_held_out", "8 held-out rows give no interval", evaluation=scores(rows=8))
    assert seen(evaluation=scores(rows=20)) == []


def test_rows_that_are_repeated() -> None:
    about = {"data": {"rows": 500, "held_out": 64, "repeated": 100, "known": 0}}
    only("duplicates", "100 of 500 training rows repeat", record={"settings": RECIPE, "about": about})
    about = {"data": {"rows": 500, "held_out": 64, "repeated": 1, "known": 5}}
    only("duplicates", "5 of 64 held-out rows are trained on", record={"settings": RECIPE, "about": about})


def test_memory_over_the_plan() -> None:
    only("over_plan", "training peak 330 MiB, planned 300 MiB (+10.0%)", memory={"measured_peak": 330 << 20})
    rows = [{"phase": "verify", "planned": 300 << 20, "measured": 450 << 20}, {"phase": "save", "planned": None, "measured": None}]
    only("over_plan", "beyond the budget of 400 MiB: verify by 50 MiB", memory={"measured_peak": 300 << 20, "rows": rows})


def test_runs_that_did_not_end() -> None:
    killed = {"settings": RECIPE, "sessions": [{"exit": None}]}
    only("unfinished", "ended without a word", status="killed", record=killed, events=log(falling)[:81])
    only("unfinished", "it is interrupted at step 40 of 60", status="interrupted", record=killed, events=log(falling)[:81])
    failed = {"settings": RECIPE, "sessions": [{"exit": 1, "said": "the disk is full"}]}
    assert only("unfinished", "the disk is full: finebits train runs/a/recipe.yaml --resume", status="failed", record=failed).sure == "fail"
    out = {"settings": RECIPE, "sessions": [{"exit": 5, "said": "qera was killed by the system, most likely for want of memory"}]}
    only("out_of_memory", "the budget is 400 MiB", status="failed", record=out)
