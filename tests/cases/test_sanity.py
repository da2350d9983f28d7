"""A run watches itself: the first loss that is no number stops it, and samples end at the model's own stop tokens."""

from __future__ import annotations

import json
import unittest
import warnings

import pytest
import torch

import tiny_llama as tiny
from finebits.evaluate.generate import greedy
from finebits.train import Diverged, train

pytest.importorskip("trl")


@pytest.mark.parametrize(("clip", "hint"), [(0.0, r"max_grad_norm \(0 now"), (1.0, "nothing of it is kept")])
def test_a_run_that_diverges_stops_at_the_step(tmp_path, clip, hint):
    """getainode/ainode#186: all steps were trained on NaN, and the adapter was saved."""
    from finebits.interop.trainer import trainer

    words = tiny.worded(tmp_path / "m")
    from finebits.interop.tokenizer import tokenizer_of

    rows = [{"input_ids": [3, 4, 5 + i], "labels": [-100, 4, 5 + i]} for i in range(8)]
    arguments = {"max_steps": 6, "learning_rate": 1e30, "max_grad_norm": clip, "per_device_train_batch_size": 2}
    events = tmp_path / "events.jsonl"
    engine = trainer(tiny.tuned(tiny.plan()), tokenizer_of(words), rows, tmp_path / "out", arguments, events=events)
    with pytest.raises(
        Diverged, match=rf"step [2-5] of 6: .* is not a finite number .*lower training.learning_rate \(1e\+30 now\).*|{hint}"
    ):
        engine.train()
    steps = [e for e in map(json.loads, events.read_text().splitlines()) if e["event"] == "step"]
    assert len(steps) < 6 and all(abs(e["loss"]) < float("inf") for e in steps)
    assert Diverged.code == 1


def test_the_plain_loop_stops_before_the_weights_are_touched():
    model = tiny.tuned(tiny.plan())
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        trained[0].fill_(float("inf"))
    before = [p.clone() for p in trained]
    with pytest.raises(Diverged, match="step 1: the loss is not a finite number"):
        train(model, [tiny.batches()], torch.optim.SGD(trained, 0.1), total=1)
    assert all(torch.equal(a, b) for a, b in zip(trained, before, strict=True))


def test_samples_stop_at_any_stop_token_and_say_nothing():
    model = tiny.tuned(tiny.plan())
    whole = greedy(model, [[3, 4, 5]], 8, [])[0]
    model.generation_config.temperature, model.generation_config.top_p = 0.6, 0.9
    with warnings.catch_warnings(), unittest.TestCase().assertNoLogs("transformers", "WARNING"):
        warnings.simplefilter("error")
        made = greedy(model, [[3, 4, 5]], 8, [127, whole[3]])[0]
    assert made == whole[: whole.index(whole[3])] and model.generation_config.temperature == 0.6
