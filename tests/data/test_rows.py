from __future__ import annotations

import json
from pathlib import Path

import pytest

from finebits.data.error import DataError
from finebits.data.forms._turns import disorder
from finebits.data.rows import Row, forms, gathered, read

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]


def write(folder: Path, text: str, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_lines_are_those_of_the_file(tmp_path):
    row = json.dumps({"messages": CHAT, "id": 7})
    rows = read(write(tmp_path, f"\ufeff\n{row}\r\n\n{row}\n"))
    assert (rows.format, [row.line for row in rows], len(rows)) == ("messages", [2, 4], 2)
    assert rows.why == 'detected: key "messages" in 2/2 rows, roles user/assistant'
    assert rows[1].messages == tuple(CHAT)
    assert [row.line for row in rows[1:]] == [4]


def test_a_unicode_line_separator_inside_a_string_does_not_end_the_row(tmp_path):
    assert read(write(tmp_path, '{"text": "a\u2028b"}\n'))[0].text == "a\u2028b"


def test_json_lists_and_objects_over_many_lines(tmp_path):
    assert [(r.line, r.text) for r in read(write(tmp_path, json.dumps([{"text": "a"}, {"text": "b"}], indent=1), "d.json"))] == [
        (2, "a"),
        (5, "b"),
    ]
    assert read(write(tmp_path, "\n" + json.dumps({"messages": CHAT}, indent=2), "d.json"))[0].line == 2
    assert [r.line for r in read(write(tmp_path, '{"text": "a"}\n{"text": "b"}\n', "d.json"))] == [1, 2]


def test_text_files_are_blocks_between_blank_lines(tmp_path):
    rows = read(write(tmp_path, "\none\nstill one\n \n\ntwo", "d.txt"))
    assert [(row.line, row.text) for row in rows] == [(2, "one\nstill one"), (6, "two")]
    assert rows.format == "text" and "2 blocks" in rows.why


def test_messages_come_before_text_unless_text_is_asked_for(tmp_path):
    path = write(tmp_path, json.dumps({"messages": CHAT, "text": "x"}))
    assert read(path).format == "messages"
    assert read(path, "text")[0].text == "x"
    assert read(path, "text").why.startswith("asked for")


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("", "d.jsonl", "d.jsonl is empty"),
        ("\n \n", "d.txt", "d.txt is empty"),
        ("[]", "d.json", "d.json is empty"),
        ('{"text": "a"}\n{"text": }\n', "d.jsonl", "d.jsonl:2: not JSON at column 10"),
        ('{"text": "a"} {"text": "b"}', "d.jsonl", "d.jsonl:1: not JSON at column 15: more text follows"),
        ('[{"text": "a"}\n{"text": "b"}]', "d.json", "d.json:2: the list of rows is broken off"),
        ('[{"text": "a"},\n', "d.json", "d.json:2: the list of rows is not closed"),
        ('[{"text": "a"}\n', "d.json", "d.json:2: the list of rows is broken off"),
        ('[{"text": "a"}]\nx', "d.json", "followed by more text"),
        ('[{"text": "a"},\n{"text" 3}]', "d.json", "d.json:2: not JSON at column 9"),
        ("[" * 100_000, "d.jsonl", "nested too deeply"),
        ('{"question": "x", "answer": "y"}', "d.jsonl", "found the keys 'question', 'answer'; wanted a key \"messages\""),
        ("[1, 2]", "d.jsonl", "must be a JSON object with a key"),
        ('{"text": "a"}\n{"messages": []}', "d.jsonl", 'd.jsonl:2: wanted a key "text" as in line 1'),
        ('{"text": 3}', "d.jsonl", '"text" must be a string; got a number'),
        ('{"messages": []}', "d.jsonl", '"messages" must be a list of {"role", "content"}; got an empty list'),
        ('{"messages": ["hi"]}', "d.jsonl", "turn 1 must be an object"),
        ('{"messages": [{"role": "user"}]}', "d.jsonl", "turn 1 needs \"content\" as a string; got the keys 'role'"),
        ('{"messages": [{"role": "user", "content": null}]}', "d.jsonl", 'turn 1 needs "content" as a string; got null'),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": 1}', "d.jsonl", '"tools" must be a list; got a number'),
        ('{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tokenize": 1}}', "d.jsonl", "sets 'tokenize'"),
        ('{"id": ' + "9" * 5000 + ', "text": "x"}', "d.jsonl", "a number has more digits than can be read"),
    ],
)
def test_bad_content_names_file_line_and_what_was_wanted(tmp_path, text, name, says):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, text, name))
    assert says in str(caught.value) and caught.value.code == 4


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"d.jsonl:2: byte 0xff is not UTF-8"):
        read(tmp_path / "d.jsonl")


def test_wrong_usage_has_the_exit_code_of_usage(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, format, says in [
        (tmp_path / "no.jsonl", "auto", "is not there"),
        (tmp_path / "empty", "auto", "holds no .jsonl, .json, .csv, .tsv, .parquet or .txt file"),
        (write(tmp_path, "x"), "alpaca", f"auto, {', '.join([*forms()][:-1])} or {[*forms()][-1]}; got 'alpaca'"),
        (write(tmp_path, "x", "d.txt"), "messages", "cannot hold messages"),
    ]:
        with pytest.raises(DataError) as caught:
            read(path, format)
        assert says in str(caught.value) and caught.value.code == 2


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ("ua", None),
        ("suaua", None),
        ("uau", "end with a user turn"),
        ("uua", "hold two user turns in a row"),
        ("uaa", "hold two assistant turns in a row"),
        ("usa", "hold a system turn that is not the first turn"),
        ("ssua", "hold a system turn that is not the first turn"),
        ("a", "begin with an assistant turn"),
        ("sa", "begin with an assistant turn"),
        ("su", "hold no assistant turn"),
        ("s", "hold no assistant turn"),
        ("ufa", "hold a turn of the role 'function' (known: system, user, assistant, tool)"),
        ("uta", "hold a tool turn that follows no assistant turn"),
        ("uatta", None),
        ("uat", "end with a tool turn"),
    ],
)
def test_order_of_roles(roles, says):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "f": "function"}
    assert disorder([{"role": names[r], "content": ""} for r in roles]) == says


def test_rows_from_what_a_caller_has(tmp_path):
    rows = read(write(tmp_path, '{"text": "a"}\n\n{"text": "b"}\n'))
    assert gathered(rows) is rows
    assert gathered(tmp_path / "d.jsonl") == gathered(str(tmp_path / "d.jsonl")) == rows
    assert gathered(list(rows)[1:]).rows == (Row(3, text="b"),) and gathered(list(rows)).format == "text"
    assert gathered({"messages": CHAT} for _ in range(2))[1] == Row(2, messages=tuple(CHAT))
    for wrong, says in [
        ([], "the given data is empty"),
        ([rows[0], Row(1, messages=tuple(CHAT))], "of several kinds (messages, text)"),
        ([rows[0], {"text": "a"}], "of several kinds (no Row, text)"),
        (["a"], "the given data:1: a row must be a JSON object"),
    ]:
        with pytest.raises(DataError) as caught:
            gathered(wrong)
        assert says in str(caught.value)
