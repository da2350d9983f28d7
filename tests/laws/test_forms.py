"""Laws of the forms of rows: each reads its example, is told from the others by itself, and names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finebits.data.rows import DataError, Row, forms, read, shaped

USER, ANSWER = {"role": "user", "content": "say two"}, {"role": "assistant", "content": "two"}
CHAT = (USER, ANSWER)
EXAMPLES = {  # form -> (a row of a file, what it becomes)
    "messages": ({"messages": [*CHAT]}, Row(1, CHAT)),
    "text": ({"text": "one two"}, Row(1, text="one two")),
    "image": ({"image": [[0, 255]], "label": "edge"}, Row(1, image=[[0, 255]], label="edge")),
    "prompt_completion": ({"prompt": "say two", "completion": "two"}, Row(1, CHAT)),
    "sharegpt": ({"conversations": [{"from": "human", "value": "say two"}, {"from": "gpt", "value": "two"}]}, Row(1, CHAT)),
    "pretokenised": ({"input_ids": [5, 6], "labels": [-100, 6]}, Row(1, tokens=((5, 6), (False, True)))),
    "preference": (
        {"prompt": "say two", "chosen": "two", "rejected": "three"},
        Row(1, CHAT, rejected=Row(1, (USER, {"role": "assistant", "content": "three"}), liked=False)),
    ),
    "unpaired_preference": (
        {"prompt": "say two", "completion": "two", "label": False},
        Row(1, CHAT, liked=False),
    ),
    "instruction": ({"instruction": "say two", "input": "", "output": "two"}, Row(1, CHAT)),
}
every = pytest.mark.parametrize("name", EXAMPLES)


def test_every_form_has_an_example() -> None:
    assert EXAMPLES.keys() == forms().keys()


@every
def test_a_form_reads_its_example_and_is_found_by_itself(name: str, tmp_path: Path) -> None:
    record, row = EXAMPLES[name]
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    for format in ("auto", name):
        found = read(tmp_path / "d.jsonl", format)
        assert found.rows == (row,) and found.format == row.kind
        assert all(f'"{key}"' in found.why for key in forms()[name].keys)


@every
@pytest.mark.parametrize("other", EXAMPLES)
def test_a_form_refuses_rows_of_the_others(name: str, other: str) -> None:
    if {*forms()[name].keys} <= EXAMPLES[other][0].keys():
        return  # which reads as either
    with pytest.raises(DataError, match="d:1: wanted a key .*; found the keys"):
        shaped([(1, EXAMPLES[other][0])], "d", name)
    with pytest.raises(DataError, match="d:2: wanted a key .* as in line 1"):
        shaped([(1, EXAMPLES[name][0]), (2, EXAMPLES[other][0])], "d")


@every
def test_a_value_of_another_kind_is_named_with_its_line(name: str) -> None:
    record = EXAMPLES[name][0]
    for key in forms()[name].keys:
        with pytest.raises(DataError, match=f'd:7: .*"{key}"') as e:
            shaped([(7, record | {key: 3})], "d")
        assert e.value.code == 4


def test_turns_of_a_prompt_are_shown_and_those_of_a_completion_learned() -> None:
    prompt = [USER, ANSWER, {"role": "user", "content": "and three"}]
    (row,) = shaped([(1, {"prompt": prompt, "completion": [{"role": "assistant", "content": "three"}]})], "d")
    assert row.messages is not None and len(row.messages) == 4 and row.untrained == {1}


def test_an_instruction_has_its_input_and_its_system_turn() -> None:
    (row,) = shaped([(1, {"instruction": "add", "input": "1, 2", "output": "3", "system": "be short"})], "d")
    assert [(m["role"], m["content"]) for m in row.messages or ()] == [
        ("system", "be short"),
        ("user", "add\n\n1, 2"),
        ("assistant", "3"),
    ]


def test_keys_of_two_forms() -> None:
    record = EXAMPLES["text"][0] | EXAMPLES["instruction"][0]  # Alpaca's files have the framed text beside the parts
    assert shaped([(1, record)], "d").format == "text" and shaped([(1, record)], "d", "instruction").format == "messages"
