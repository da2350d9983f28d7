"""Rows of answers that were liked more and less: what is read, what is refused, and what held-out ones say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finebits.data.rows import DataError, read
from finebits.data.split import split
from finebits.data.tokens import tokenize
from finebits.errors import Invalid
from finebits.evaluate.heldout import Scores
from finebits.evaluate.preferences import in_order, liked_only, preferences
from finebits.objectives.base import fits
from finebits.objectives.dpo import DPO
from finebits.objectives.kto import KTO
from finebits.recipe import Recipe, RecipeError

TURNS = [{"role": "user", "content": "2 + 2?"}]
FOUR, FIVE = ({"role": "assistant", "content": c} for c in "45")


def of(tmp_path: Path, *records: dict[str, Any]) -> Any:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return read(file)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": TURNS, "chosen": [FOUR], "rejected": [FIVE]},
        {"chosen": [*TURNS, FOUR], "rejected": [*TURNS, FIVE]},
    ],
)
def test_every_form_of_a_pair_is_one_row(record: dict[str, Any], tmp_path: Path) -> None:
    (row,) = of(tmp_path, record)
    assert [[m["content"] for m in answer.messages] for answer in row.answers] == [["2 + 2?", "4"], ["2 + 2?", "5"]]
    assert [answer.liked for answer in row.answers] == [True, False]
    other = of(tmp_path, {"prompt": "2 + 2?", "chosen": "4", "rejected": "6"})[0]
    assert other.said != row.said  # a run is another where the other answer is


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": [FOUR], "rejected": [FIVE]}, "no prompt that both answers begin with"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, '"chosen" must be a string or a list'),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "must be true"),
    ],
)
def test_what_is_no_pair_is_refused(record: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        of(tmp_path, record)


def test_pairs_stay_together_from_file_to_tokens(tmp_path: Path) -> None:
    import chatty

    rows = of(tmp_path, *({"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)))
    train, held = split(rows, 0.25)
    tokens = tokenize(train, chatty.tokenizer(), 64)
    assert len(tokens) == 2 * len(train) == 18 and len(held) == 3
    assert [e.liked for e in tokens] == [True, False] * 9


def test_rows_and_losses_fit_or_are_refused(tmp_path: Path) -> None:
    pair = of(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    single = of(tmp_path, *({"prompt": "a", "completion": "b", "label": wanted} for wanted in (True, False)))
    fits(DPO(), pair, "rows")
    fits(KTO(), single, "rows")
    for objective, rows, words in (
        (None, pair, "set training.loss to dpo or orpo"),
        (None, single, "set training.loss to kto"),
        (KTO(), pair, "kto learns from single ones"),
        (DPO(), single, "rows without a second answer"),
        (KTO(), single[:1], "learns from both kinds"),
    ):
        with pytest.raises(Invalid, match=words):
            fits(objective, rows, "rows")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("training.loss=dpo", "give an even number"),
        ("training={loss: {paper: dpo, beta: 0}, per_device_train_batch_size: 2}", "beta is 0"),
        ("training={loss: dop, per_device_train_batch_size: 2}", "dpo"),
        ("training={loss: kto, label_smoothing_factor: 0.1}", "compares whole answers"),
        ("{training: {loss: kto}, evaluation: {compare: [qlora]}}", "own loss alone"),
    ],
)
def test_a_recipe_of_answers_is_looked_at(said: str, words: str) -> None:
    text = "model: {model_name_or_path: m}\n"
    body, over = (text + said[1:-1].replace(", evaluation", "\nevaluation"), []) if said.startswith("{") else (text, [said])
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(body, overrides=over)


def test_held_out_answers_by_hand() -> None:
    """Forty pairs, three quarters of which are preferred as they were liked, scored longest first."""
    lengths = [5 + i % 7 for i in range(80)]
    own = np.array([1.0 if i % 2 == 0 else (2.0 if i % 8 < 6 else 0.0) for i in range(80)])
    order = sorted(range(80), key=lambda i: -lengths[i])
    assert np.array_equal(in_order(own[order], lengths), own)
    liked = [i % 2 == 0 for i in range(80)]
    made = preferences(Scores(own, np.ones(80)), Scores(np.ones(80), np.ones(80)), liked, DPO(beta=2.0))
    assert made["accuracy"][0] == 0.75 and made["margin"][0] == pytest.approx(2.0 * (0.75 - 0.25))
    low, high = made["accuracy"][1:]
    assert low is not None and high is not None and 0.55 < low < 0.75 < high < 0.95
    assert liked_only(Scores(own, np.ones(80)), liked).loss == 1.0
