"""Mixtures, rows that are left out, rows that say the same, two parts that share nothing, other forms, figures."""

from __future__ import annotations

import json

import pytest

import chatty
from finebits.data.check import check
from finebits.data.convert import converted
from finebits.data.duplicates import repeated, shared
from finebits.data.error import DataError
from finebits.data.incomplete import complete
from finebits.data.mixture import mixed
from finebits.data.parted import parted
from finebits.data.rows import joined, shaped
from finebits.data.stats import stats, text
from finebits.data.tokens import tokenize

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def texts(count, path="a.jsonl"):
    return shaped([(i, {"text": f"{path} {i}"}) for i in range(1, count + 1)], path)


def chats(*conversations, path="a.jsonl"):
    return shaped([(i, {"messages": turns}) for i, turns in enumerate(conversations, 1)], path)


# -- mixtures


def test_weights_are_shares_of_the_whole_and_nothing_is_taken_twice():
    parts = [texts(40, "a"), texts(10, "b"), texts(1000, "c")]
    taken = mixed(parts, [None] * 3, [2, 1, 1], seed=0)
    assert [len(p) for p in taken] == [20, 10, 10]
    assert all(len({r.line for r in p}) == len(p) and [r.line for r in p] == sorted(r.line for r in p) for p in taken)
    assert "10 of 1,000 rows are taken" in taken[2].why and "taken" not in taken[1].why


def test_a_mixture_is_the_seeds():
    again = [mixed([texts(100)], [0.2], [None], seed=s)[0].rows for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2] and len(again[2]) == 20
    one, two = mixed([texts(100, "a"), texts(100, "b")], [0.2, 0.2], [None, None], seed=0)
    assert [r.line for r in one] != [r.line for r in two]  # drawn apart


def test_weights_for_some_are_refused():
    with pytest.raises(DataError, match=r"and none to b: weigh all of them, or none") as caught:
        mixed([texts(3, "a"), texts(3, "b")], [None, None], [1, None], seed=0)
    assert caught.value.code == 2


def test_a_mixture_of_a_recipe(tmp_path):
    from finebits.recipe import Recipe
    from finebits.recipe.rows import rows_of, whole

    for name, count in (("a", 60), ("b", 40)):
        chatty.written(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(count)])
    words = [f"data.datasets.{i}.{k}={v}" for i, name in enumerate("ab") for k, v in (("path", tmp_path / f"{name}.jsonl"), ("weight", 1))]
    recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=words)
    assert len(whole(recipe)) == 80
    train, held = rows_of(recipe)
    assert len(train) + len(held) == 80 and rows_of(recipe) == (train, held)
    assert Recipe.parse(recipe.to_yaml()) == recipe


# -- incomplete, the same


def test_incomplete_rows_are_left_out_and_counted():
    rows = complete(chats([U, A], [U, A, U], [U], [U, A]))
    assert [r.line for r in rows] == [1, 4] and rows.why.endswith("; 2 incomplete rows left out (lines 2, 3)")
    assert complete(chats([U, A])).why == chats([U, A]).why
    with pytest.raises(DataError, match="holds no complete conversation"):
        complete(chats([U], [U, A, U]))
    words = chatty.tokenizer()
    assert not check(chats([U, A], [U, A, U]), words, 64).ok and check(complete(chats([U, A], [U, A, U])), words, 64).ok
    assert "--drop-incomplete" in check(chats([U, A], [U, A, U]), words, 64).text()


def test_rows_that_say_the_same():
    rows = chats([U, A], [U, A, U, A], [U, A])
    assert repeated(rows.rows) == [[0, 2]]
    assert shared(chats([U, A]), chats([U, A, U, A], path="b.jsonl")) is None
    finding = shared(rows, chats([U, A], [U, A], [U, A, U, A, U, A], path="b.jsonl"))
    assert finding is not None and finding.level == "warn" and finding.lines == ("b.jsonl:1", "b.jsonl:2")
    assert finding.message.startswith("2 held-out rows say what a training row says")


@pytest.mark.parametrize("share", [None, 0.1, 0.5])
def test_two_parts_share_nothing(share):
    records = [{"text": f"{i % 70}"} for i in range(100)]
    train, held = parted(records, share, seed=3)
    assert len(train) + len(held) == 100 and len(held) >= round(100 * (share or 0.02))
    assert not {r["text"] for r in train} & {r["text"] for r in held}
    assert parted(records, share, seed=3) == (train, held) != parted(records, share, seed=4)
    with pytest.raises(DataError, match="nothing is left to hold out"):
        parted([{"text": "a"}] * 3)


# -- other forms


def test_conversion_keeps_what_is_learned():
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [{**U, "content": "1"}, {**A, "content": "one", "weight": 0}, {**U, "content": "2"}, {**A, "content": "two"}, U, A]
    rows = shaped([(1, {"messages": turns, "tools": tools})], "a.jsonl")
    (back,) = converted(rows, "messages")
    assert shaped([(1, back)], "a.jsonl").rows == rows.rows and back["tools"] == tools
    pairs = [*converted(rows, "prompt_completion")]
    assert [(len(p["prompt"]), p["completion"][0]["content"]) for p in pairs] == [(3, "two"), (5, "ho")]
    words = chatty.tokenizer()
    plain = shaped([(1, {"messages": turns})], "a.jsonl")
    of_pairs = tokenize(shaped(enumerate(converted(plain, "prompt_completion"), 1), "b.jsonl"), words, 512)
    assert sum(of_pairs.labelled) == sum(tokenize(plain, words, 512).labelled)


def test_judged_answers_become_those_that_are_wanted():
    pairs = shaped([(1, {"prompt": "hi", "chosen": "ho", "rejected": "no"})], "a.jsonl")
    assert [*converted(pairs, "prompt_completion")] == [{"prompt": [U], "completion": [A]}]
    judged = shaped([(i, {"prompt": "hi", "completion": c, "label": c == "ho"}) for i, c in ((1, "ho"), (2, "no"))], "a.jsonl")
    assert [*converted(judged, "messages")] == [{"messages": [U, A]}]
    with pytest.raises(DataError, match="holds text rows, which have no turns to convert"):
        [*converted(texts(1), "messages")]


# -- preferences and judged answers


CHOSEN = [U, {"role": "assistant", "content": "good"}]
REJECTED = [U, {"role": "assistant", "content": "bad"}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "chosen": "good", "rejected": "bad"},
        {"prompt": [U], "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
        {"prompt": [U], "chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": "hi", "chosen": CHOSEN, "rejected": REJECTED},
        {"chosen": CHOSEN, "rejected": REJECTED},
    ],
)
def test_every_way_to_write_a_pair_is_the_same_pair(record):
    (row,) = shaped([(1, record)], "a.jsonl")
    assert [answer.messages for answer in row.answers] == [tuple(CHOSEN), tuple(REJECTED)] and not row.rejected.liked


def test_a_pair_of_strings_without_a_prompt():
    (row,) = shaped([(1, {"chosen": "what is 2 + 2? 4 of course", "rejected": "what is 2 + 2? 41"})], "a.jsonl")
    asked, right, wrong = row.messages[0], row.messages[1], row.rejected.messages[1]
    assert [turn["content"] for turn in (asked, right, wrong)] == ["what is 2 + 2? ", "4 of course", "41"]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"chosen": "yes", "rejected": "no"}, "there is no prompt that both answers begin with"),
        ({"prompt": "hi", "chosen": "ho", "rejected": "ho"}, '"chosen" and "rejected" are the same'),
        ({"chosen": [U], "rejected": REJECTED}, 'there is no turn in "chosen" behind the prompt'),
        ({"prompt": "hi", "chosen": [], "rejected": "no"}, '"chosen" must be a string or a list'),
        ({"prompt": "hi", "completion": "ho", "label": 1}, '"label" must be true or false'),
        ({"prompt": 3, "completion": "ho", "label": True}, '"prompt" must be a string'),
        ({"input_ids": [5, 6], "labels": [5]}, '"labels" has 1 numbers and "input_ids" 2'),
        ({"input_ids": [5, 6], "labels": [-100, 7]}, "the label of token 2 is 7"),
        ({"input_ids": [5, -1]}, "it holds -1"),
        ({"input_ids": [5, True]}, "it holds True"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 is said by 'narrator'"),
        ({"conversations": [{"from": "gpt"}]}, 'turn 1 needs "value" as a string'),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "turn 1 (function_call) must be JSON"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, '"history" must be a list of pairs of strings'),
    ],
)
def test_what_is_wrong_with_a_row_is_said(record, says):
    with pytest.raises(DataError) as caught:
        shaped([(4, record)], "a.jsonl")
    assert says in str(caught.value) and str(caught.value).startswith("a.jsonl:4: ")


def test_sharegpt_with_tools_and_history_of_alpaca():
    call = {"name": "add", "arguments": {"a": 1}}
    said = [("system", "be short"), ("human", "1 + 1?"), ("function_call", json.dumps(call)), ("observation", "2"), ("gpt", "2")]
    record = {"conversations": [{"from": f, "value": v} for f, v in said], "tools": json.dumps([{"name": "add"}])}
    (row,) = shaped([(1, record)], "a.jsonl")
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"] == [{"type": "function", "function": call}] and row.template_kwargs == {"tools": [{"name": "add"}]}
    (row,) = shaped([(1, {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]})], "a.jsonl")
    assert "".join(m["content"] for m in row.messages) == "sabcd" and not row.untrained


def test_ids_are_taken_as_they_are():
    rows = shaped([(1, {"input_ids": [7, 8, 9, 0], "labels": [-100, 8, 9, 0], "attention_mask": [1, 1, 1, 0]})], "a.jsonl")
    (e,) = tokenize(rows, chatty.tokenizer(), 64)
    assert (e.input_ids, e.labels) == ([7, 8, 9], [-100, 8, 9])
    checked = check(rows, chatty.tokenizer(chat=None), 64)
    assert checked.ok and checked.trained_tokens == 2 and "what the rows mark" in checked.text() and "none (tokens rows)" in checked.text()


# -- figures


def test_figures_of_cutting():
    rows = shaped([(i, {"text": "x" * n}) for i, n in enumerate((10, 99, 200, 200), 1)], "a.jsonl")
    held = stats(rows, tokenize(rows, chatty.tokenizer(), 1 << 30), 128)
    assert (held["rows"], held["tokens"], held["trained_tokens"]) == (4, 513, 509)  # each with its end, and nothing before the first
    assert held["lengths"]["p50"] == held["lengths"]["max"] == 201 and held["duplicates"] == {"rows": 1, "lines": [[3, 4]]}
    assert [(c["max_length"], c["rows"], c["tokens"]) for c in held["cut"]] == [(64, 3, 36 + 2 * 137), (128, 2, 2 * 73)]
    assert held["packing"] == {"packs": 3, "filled": (11 + 100 + 256) / 384}
    assert "4 rows in 3 packs of 128" in text(held) and "128       50.0%" in text(held)


def test_files_of_a_mixture_are_counted():
    rows = joined([texts(2, "a"), texts(3, "b")])
    assert stats(rows, tokenize(rows, chatty.tokenizer(), 64), 64)["files"] == {"a": 2, "b": 3}
