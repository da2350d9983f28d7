"""Answers against references."""

import json

import numpy as np
import pytest

from finebits.errors import Invalid
from finebits.evaluate import harness, matching, suites
from finebits.evaluate.resampled import LEAST, Resampled


@pytest.mark.parametrize(
    ("how", "answer", "reference", "right"),
    [
        ("exact", " The  Cat.", "the cat", True),
        ("exact", "the cat sat", "the cat", False),
        ("contains", "It is SPAM, surely", "spam", True),
        ("contains", "spammer", "spam", False),
        ("number", "First 3, then 1,204.50", "#### 1204.5", True),
        ("number", "no idea", "4", False),
        ("number", "4", "four", False),
        ("number", "-7", "so -7.0 it is", True),
        (r"regex:\b([AB])\b", "A or B", "B", True),
        (r"regex:\b([AB])\b", "neither", "B", False),
        (r"regex:answer: (\w+)", "The answer: Yes", "answer: yes", True),
    ],
)
def test_what_counts_as_right(how, answer, reference, right):
    assert matching.by(how)(answer, reference) is right


@pytest.mark.parametrize("how", ["fuzzy", "regex", "regex:(", "regex:"])
def test_no_other_match_is_taken(how):
    with pytest.raises(Invalid):
        matching.by(how)


def test_a_judge_is_the_users_function(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def ends(rows, answers): return [float(a.endswith(r['reference'])) for r, a in zip(rows, answers)]\n"
        "def short(rows, answers): return [1]\n"
        "def wild(rows, answers): return [2.0 for _ in rows]\n"
        "def none(rows, answers): return None\n"
        "word = 'x'\n"
    )
    rows, answers = [{"prompt": "p", "reference": "b"}] * 2, ["ab", "ba"]
    monkeypatch.chdir(tmp_path)
    assert matching.judge(f"{tmp_path / 'mine.py'}:ends")(rows, answers) == [1.0, 0.0] == matching.judge("mine:ends")(rows, answers)
    for name, said in (("short", "1 numbers for 2"), ("wild", "2, which is not"), ("none", "NoneType")):
        with pytest.raises(Invalid, match=said):
            matching.judge(f"mine:{name}")(rows, answers)
    for named in ("mine:word", "mine:absent", "mine", "no_such_module_here:f", "absent.py:f"):
        with pytest.raises(Invalid):
            matching.judge(named)


def test_mails_are_taken_label_by_label_and_one_label_answers(tmp_path):
    rows = [("buy", "spam"), ("win", "spam"), ("hi", "ham"), ("dear", "ham")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    asked = suites.suite(f"spam:{tmp_path / 'm.jsonl'}", 2)
    assert [q.reference for q in asked] == ["spam", "ham"] and "ham or spam" in asked[0].text
    assert [asked[0].score(s) for s in ("Spam.", "ham", "ham, no, spam", "")] == [1, 0, 0, 0]
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(Invalid, match="a text and a label"):
        suites.suite(f"spam:{tmp_path / 't.jsonl'}")
    with pytest.raises(Invalid, match="name a file"):
        suites.suite(f"spam:{tmp_path / 'absent.jsonl'}")


def test_what_is_not_installed_is_named_with_its_line(monkeypatch, tmp_path):
    for name in ("reasoning_gym", "lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(Invalid, match="pip install reasoning-gym"):
        suites.suite("gsm_symbolic")
    with pytest.raises(Invalid, match="pip install lm_eval"):
        harness.check(["toy"], tmp_path)


def test_rows_of_the_harness_are_in_their_order_and_filters_apart():
    samples = [
        {"doc_id": d, "filter": f, "metrics": ["exact_match", "text"], "exact_match": float(f == "loose"), "text": "x"}
        for d in (1, 0)
        for f in ("strict", "loose")
    ]
    made = harness.metrics(samples)
    assert {k: v.tolist() for k, v in made.items()} == {"exact_match (strict)": [0, 0], "exact_match (loose)": [1, 1]}


def test_a_paired_difference_is_sharper_than_two_intervals():
    gen = np.random.default_rng(0)
    hard = gen.random(200)
    a, b = (hard < 0.5).astype(float), (hard < 0.55).astype(float)  # the same rows, of which b gets a few more
    drawn = Resampled(np.ones(200))
    (low, high), (_, other) = drawn.interval(b), drawn.interval(a)
    middle, lo, hi = drawn.minus(b, a)
    assert low < other and lo > 0, "each alone overlaps, the difference leaves out zero"
    assert hi - lo < high - low and middle == pytest.approx(drawn.mean(b) - drawn.mean(a))
    assert Resampled(np.ones(LEAST - 1)).minus(a[: LEAST - 1], b[: LEAST - 1])[1:] == [None, None]
