"""Continuations: batches, draws, streams."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny_llama
import pytest
import torch

import tiny_llama as tiny
from finebits.errors import Invalid
from finebits.evaluate.generate import Drawn, Sampling, Streamer, continued, greedy, together

PROMPTS = [[5, 9, 11], [7, 3, 8, 60, 4], [12]]


def test_a_batch_says_what_each_prompt_alone_does():
    model = tiny.tuned(tiny.plan())
    alone = greedy(model, PROMPTS, 6, stop=[])
    assert [c.ids for c in continued(model, PROMPTS, 6, [])] == alone
    end = alone[0][2]
    made = continued(model, PROMPTS[:1], 6, [end])[0]
    assert made.stopped and made.ids == alone[0][: alone[0].index(end)]


def test_draws_depend_on_the_seed_and_the_row_alone():
    model, how = tiny.tuned(tiny.plan()), Sampling(temperature=1.0, seed=3)
    made = [c.ids for c in continued(model, PROMPTS, 8, [], how, ["a", "b", "c"])]
    assert [c.ids for c in continued(model, PROMPTS[1:2], 8, [], how, ["b"])] == made[1:2]
    assert [c.ids for c in continued(model, PROMPTS, 8, [], Sampling(1.0, seed=4), ["a", "b", "c"])] != made


def test_draws_follow_the_softmax_and_its_nucleus():
    z = torch.tensor([[0.5, 2.0, -1.0, 1.0]])
    draw = Drawn(Sampling(temperature=0.7), ["a"])
    found = torch.bincount(torch.stack([draw(z, z).argmax(-1)[0] for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(found, (z[0] / 0.7).softmax(-1), atol=0.03, rtol=0)
    p = (z[0]).softmax(-1)
    narrow = Drawn(Sampling(temperature=1.0, top_p=float(p.max()) + 0.01), ["a"])
    assert {int(narrow(z, z).argmax(-1)) for _ in range(300)} == {1, 3}, "the fewest tokens that hold top_p"


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}])
def test_other_settings_are_refused(wrong):
    with pytest.raises(Invalid):
        Sampling(**wrong)


def test_a_streamer_hears_every_token_and_tells_the_speed():
    model, heard = tiny.tuned(tiny.plan()), []
    streamer = Streamer(heard.append)
    made = continued(model, PROMPTS[:1], 5, [], streamer=streamer)
    assert heard == made[0].ids and streamer.speed > 0
    assert Streamer().speed is None


def test_recurrent_models_are_not_padded():
    model = tiny.fresh()
    assert together(model, 4) == 4
    model._is_stateful = True
    assert together(model, 4) == 1
