"""Evaluation while training: what it measures, that it changes nothing, the best checkpoint, early stopping, and resuming with all of these."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from finebits.data.tokens import to_batch
from finebits.errors import Invalid
from finebits.evaluate.heldout import score
from finebits.interop.trainer import checkpoints
from finebits.recipe import Recipe, RecipeError
from training.small import equal, model, rows, trained

HELD = [to_batch(rows(4, seed=9), 0), to_batch(rows(3, seed=8), 0)]
EVERY = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "held": HELD}


def evaluated(file: Path) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, file.read_text().splitlines()) if e["event"] == "eval"]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("plain"))


def test_it_is_the_held_out_loss_and_changes_nothing(tmp_path: Path, plainly: Any) -> None:
    engine = trained(tmp_path, events=tmp_path / "events.jsonl", **EVERY)
    seen = evaluated(tmp_path / "events.jsonl")
    assert [e["step"] for e in seen] == [0, 2, 4, 6]
    assert seen[0]["loss"] == pytest.approx(score(model(), HELD).loss, rel=1e-5)
    assert seen[-1]["loss"] == pytest.approx(score(engine.model, HELD).loss, rel=1e-5)
    lowest = min(seen, key=lambda e: e["loss"])
    assert (seen[-1]["best"], seen[-1]["best_step"]) == (lowest["loss"], lowest["step"])
    assert equal(engine, plainly)


def test_the_best_checkpoint_is_what_a_run_ends_with(tmp_path: Path) -> None:
    """At a rate at which the held-out loss soon rises."""
    best = {"load_best_model_at_end": True, "save_strategy": "best", "save_total_limit": 1, "metric_for_best_model": "loss"}
    engine = trained(tmp_path, events=tmp_path / "events.jsonl", **EVERY | best, learning_rate=0.3, max_steps=8)
    seen = evaluated(tmp_path / "events.jsonl")
    lowest = min(seen[1:], key=lambda e: e["loss"])
    assert seen[-1]["loss"] > lowest["loss"]
    if lowest["loss"] < seen[0]["loss"]:
        assert score(engine.model, HELD).loss == pytest.approx(lowest["loss"], rel=1e-6)
    assert {c.name for c in checkpoints(tmp_path)} == {f"checkpoint-{lowest['step']}", "checkpoint-8"}


def test_best_keeps_the_last_state_too_and_a_run_goes_on_from_it(tmp_path: Path) -> None:
    """Killed after an evaluation that gained nothing: the resumed run is the run."""
    best = EVERY | {"save_strategy": "best", "save_total_limit": 1, "metric_for_best_model": "loss", "learning_rate": 0.3, "max_steps": 8}
    whole = trained(tmp_path / "whole", **best)
    assert whole.state.best_global_step < 6  # so that step 6 is not the best
    seen = []

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "save":
            seen.append({c.name for c in checkpoints(tmp_path / "cut")})
            if event["step"] == 6:
                shutil.copytree(tmp_path / "cut", tmp_path / "killed")

    trained(tmp_path / "cut", watch=watch, **best)
    assert len(seen) == 4 and all(len(names) <= 2 for names in seen)
    (last,) = checkpoints(tmp_path / "killed")[-1:]
    assert last.name == "checkpoint-6"
    assert equal(trained(tmp_path / "killed", resume=str(last), **best), whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(folder, patience=(2, 0.0), **SAVED)


SAVED = EVERY | {
    "eval_on_start": False,
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "save_steps": 2,
    "metric_for_best_model": "loss",
    "learning_rate": 0.1,
    "max_steps": 10,
    "gradient_accumulation_steps": 2,
    "neftune_noise_alpha": 5.0,
}


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_is_the_run_bit_for_bit(whole: tuple[Path, Any], tmp_path: Path, at: int) -> None:
    """With accumulation, noise, evaluation, patience and the best checkpoint, in a folder that has moved."""
    folder, run = whole
    for checkpoint in checkpoints(folder):
        if int(checkpoint.name.split("-")[1]) <= at:
            shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    again = trained(tmp_path, resume=str(tmp_path / f"checkpoint-{at}"), patience=(2, 0.0), **SAVED)
    keep = lambda engine: [(e["step"], e["eval_loss"]) for e in engine.state.log_history if "eval_loss" in e]  # noqa: E731
    assert keep(again) == keep(run) and again.state.global_step == run.state.global_step
    assert again.state.best_global_step == run.state.best_global_step and equal(again, run)


def test_a_run_that_was_killed_behind_its_last_step_takes_no_more(tmp_path: Path) -> None:
    """In the middle of an epoch, where transformers takes one more."""
    own = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(tmp_path, **own)
    again = trained(tmp_path, resume=str(tmp_path / "checkpoint-4"), **own)
    assert again.state.global_step == 4 and equal(again, whole)


def test_it_stops_after_so_many_evaluations_without_a_gain(whole: tuple[Path, Any], tmp_path: Path) -> None:
    engine = trained(tmp_path, patience=(1, 10.0), **EVERY | {"metric_for_best_model": "loss"})  # nothing gains ten nats
    assert engine.state.global_step == 4  # the second evaluation after the start, which counts for nothing


def test_a_checkpoint_is_kept_beside_the_best(tmp_path: Path) -> None:
    engine = trained(tmp_path, save_total_limit=1, **SAVED | {"learning_rate": 0.5, "neftune_noise_alpha": None})
    left = {c.name for c in checkpoints(tmp_path)}
    assert left == {f"checkpoint-{engine.state.best_global_step}", "checkpoint-10"}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("training.load_best_model_at_end=true", "load_best_model_at_end looks at the held-out loss"),
        ("training.early_stopping_patience=2", "early_stopping_patience looks at"),
        ("training.save_strategy=best", "eval_strategy is no"),
        ("training={eval_strategy: steps, load_best_model_at_end: true, eval_steps: 7}", "a checkpoint of every evaluation"),
        ("training={eval_strategy: steps, metric_for_best_model: margin}", "which only preferences have"),
        ("training={optim: lion, adam_beta2: 0.9}", "adam_beta2 is a setting of Adam"),
    ],
)
def test_what_nothing_would_read_is_refused(said: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.parse("model: {model_name_or_path: m}", overrides=[said])


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    broken = [{k: v.clone() for k, v in HELD[0].items()}]
    made = model()
    made.lm_head.weight.data[5] = torch.nan  # a word that no training row has to predict still counts in the sum
    with pytest.raises((ArithmeticError, Invalid), match="not a finite number"):
        trained(tmp_path, made=made, **EVERY | {"held": broken})
