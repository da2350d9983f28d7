"""Rows are tokenized once: the arrays say what lists of tokens say, and their file comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from finebits.data import arrays
from finebits.data.arrays import Example, Tokens
from finebits.data.tokens import tokenize
from finebits.errors import Invalid

EXAMPLES = [
    Example([5, 6, 7, 8], [-100, 6, -100, 8], 3, 2, "a.jsonl"),
    Example([9], [-100], 4, 0, "a.jsonl"),
    Example([5, 2], [5, 2], 1, 0, "b.jsonl"),
]


def test_arrays_say_what_the_examples_say() -> None:
    made = Tokens.of(EXAMPLES, 4, True)
    assert list(made) == EXAMPLES and [e.where for e in made] == ["a.jsonl:3", "a.jsonl:4", "b.jsonl:1"] and made[-1] == EXAMPLES[-1]
    assert made.lengths == [4, 1, 2] and made.labelled == [sum(y != -100 for y in e.labels[1:]) for e in EXAMPLES] == [2, 0, 1]
    assert list(made[1:]) == EXAMPLES[1:] and list(made[::-2]) == EXAMPLES[::-2] and not len(made[3:])
    assert Tokens.of([], 4, True).lengths == Tokens.of([], 4, True).labelled == []


def test_rows_that_are_tokenized_are_cut_and_not_made_again() -> None:
    made = Tokens.of(EXAMPLES, 4, True)
    assert tokenize(made, None, 4) is made and tokenize(made, None, 9) is made
    short = tokenize(made, None, 2)
    assert short[0] == Example([5, 6], [-100, 6], 3, 4) and list(short)[1:] == EXAMPLES[1:]
    with pytest.raises(Invalid, match="assistant_only_loss=True, and False is asked for"):
        tokenize(made, None, 4, assistant_only_loss=False)


def test_the_file_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    arrays.save(path, {"train": Tokens.of(EXAMPLES, 4, True), "held": Tokens.of(EXAMPLES[:1], 4, True)}, {"made_of": "x"})
    parts, about = arrays.load(path)
    assert list(parts["train"]) == EXAMPLES and list(parts["held"]) == EXAMPLES[:1] and about == {"made_of": "x"}
    assert parts["train"][2].path == "b.jsonl" and [p.name for p in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(Invalid, match="is damaged at"):
        arrays.load(path)
