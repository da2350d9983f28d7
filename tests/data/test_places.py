"""Files, folders, patterns and data sets in the hub's form, each kind of file, and those that hold no rows."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import zipfile
from pathlib import Path

import pytest

from finebits.data.error import DataError
from finebits.data.rows import gathered, read

ROWS = [{"text": "once"}, {"text": "twice – 語"}]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(rows: list[dict], arrow: bool = False) -> bytes:
    import pyarrow
    import pyarrow.parquet

    held, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    if arrow:
        with pyarrow.ipc.new_stream(held, table.schema) as stream:
            stream.write_table(table)
    else:
        pyarrow.parquet.write_table(table, held)
    return held.getvalue()


def twice() -> bytes:
    import pyarrow
    import pyarrow.parquet

    held, column = io.BytesIO(), pyarrow.array(["once"])
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column], ["text", "text"]), held)
    return held.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", "\ufeff" + LINES.replace("\n", "\r\n")),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.csv", "id,text\n1,once\n2,twice – 語\n"),
        ("a.csv", '\ufeffid;text\r\n1;"once"\r\n2;twice – 語\r\n'),
        ("a.tsv", "text\tid\nonce\t1\ntwice – 語\t2"),
        ("a.parquet", parquet(ROWS)),
        ("no-ending", parquet(ROWS)),
        ("a.arrow", parquet(ROWS, arrow=True)),
        ("a.txt", "once\n\ntwice – 語\n"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.csv.bz2", bz2.compress("text\nonce\ntwice – 語\n".encode())),
        ("a.txt.xz", lzma.compress("once\n\ntwice – 語".encode())),
        ("a.parquet.gz", gzip.compress(parquet(ROWS), mtime=0)),
        ("A.CSV", "text,id\nonce,1\ntwice – 語,2\n"),
        ("A.TXT", "once\n\ntwice – 語\n"),
        ("A.JSON", json.dumps(ROWS, indent=1)),
        ("A.TSV.GZ", gzip.compress("text\tid\nonce\t1\ntwice – 語\t2".encode(), mtime=0)),
        ("cr.jsonl", LINES.replace("\n", "\r")),
        ("cr.csv", "text;id\ronce;1\rtwice – 語;2\r"),
        ("cr.txt", "once\r\rtwice – 語\r"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content):
    rows = read(put(tmp_path / name, content))
    assert [row.text for row in rows] == [r["text"] for r in ROWS] and rows.format == "text"


def test_an_md_file_is_one_document(tmp_path):
    assert [r.text for r in read(put(tmp_path / "a.md", "# Head\n\nbody\n"))] == ["# Head\n\nbody"]


def test_what_was_decided_is_said(tmp_path):
    assert read(put(tmp_path / "a.csv", "prompt;completion\nhi;ho\n")).why == (
        'a table with the columns prompt, completion, separated by ";": detected: keys "prompt" and "completion" in 1/1 rows, '
        "roles user/assistant"
    )
    assert read(put(tmp_path / "a.jsonl.gz", gzip.compress(LINES.encode()))).why == 'gzip, detected: key "text" in 2/2 rows'
    assert read(put(tmp_path / "b.csv", "text;n\rhi;1\r")).why.startswith('a table with the columns text, n, separated by ";": ')


def test_labels_of_columns_with_gaps(tmp_path):
    """pandas makes 1.0 of 1 where a column has a gap, and writes it so."""
    assert [r.label for r in read(put(tmp_path / "a.csv", "text,label\na,1.0\nb,\nc,0.\nd,0.5\n"))] == [1, "", 0, "0.5"]
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": None}, {"text": "c", "label": 0.5}]
    assert [r.label for r in read(put(tmp_path / "a.parquet", parquet(rows)))] == [1, None, None]
    assert [r.label for r in read(put(tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows)))] == [1, None, None]


def test_what_a_caller_has_is_rows_or_is_said_to_be_none():
    import pandas

    table = pandas.DataFrame({"text": ["once", "twice"], "label": [0, 1]})
    assert [(r.text, r.label) for r in gathered(table)] == [("once", 0), ("twice", 1)]
    for none, says in (({"train": []}, "a mapping with the keys 'train'"), (None, "a NoneType"), (5, "an? int")):
        with pytest.raises(DataError, match=f"must be a path, or rows one after the other.*; got {says}"):
            gathered(none)


def test_cells_that_are_lists_and_labels(tmp_path):
    chat = [{"role": "user", "content": 'say "two"'}, {"role": "assistant", "content": "two"}]
    quoted = json.dumps(chat).replace('"', '""')
    assert read(put(tmp_path / "a.csv", f'messages\n"{quoted}"\n'))[0].messages == tuple(chat)
    assert [r.label for r in read(put(tmp_path / "b.csv", "text,label\na,0\nb,spam\nc,2\n"))] == [0, "spam", 2]
    judged = read(put(tmp_path / "c.csv", "prompt,completion,label\na,b,True\na,c,false\n"))
    assert judged.format == "messages" and [r.liked for r in judged] == [True, False]


def test_nested_nulls_of_columns_are_left_out(tmp_path):
    call = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    turns = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": call}]
    row = read(put(tmp_path / "a.parquet", parquet([{"messages": turns, "tools": None}])))[0]
    assert row.messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": call})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "text,id\nonce\n", "a.csv:2: the row has 1 cells and the header names 2 columns ('text', 'id')"),
        ("a.csv", 'text,id\n"a\nb",1\nc,d,e\n', "a.csv:4: the row has 3 cells"),
        ("a.csv", "text,text\na,b\n", "a.csv:1: the first line of a table names its columns, each once"),
        ("a.csv", 'text\n"once\n', "a.csv:2: no row of a table"),
        ("a.csv", "text\n", "a.csv is empty"),
        ("a.csv", "input_ids\nonce\n", 'a.csv:2: the cell "input_ids" must be a list or an object in JSON'),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "a.jsonl:1: an object has the key 'text' twice"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:30], "is compressed (gzip) and broken"),
        ("a.parquet", parquet(ROWS)[:-30], "the table cannot be read behind row 0"),
        ("a.parquet", twice(), "has two columns that are called 'text'"),
        ("a.jsonl", "", "a.jsonl is empty"),
    ],
)
def test_broken_content_names_the_line(tmp_path, name, content, says):
    with pytest.raises(DataError) as caught:
        read(put(tmp_path / name, content))
    assert says in str(caught.value) and caught.value.code == 4 and "\n" not in str(caught.value)


def zipped(*names: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return held.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (zipped("xl/workbook.xml"), "is an Excel workbook: save the sheet as .csv"),
        (zipped("word/document.xml"), "is a Word document"),
        (zipped("archive/data.pkl"), "is a file of torch.save, a pickle, which runs code"),
        (zipped("a.jsonl"), "is an archive (zip): unpack it"),
        (pickle.dumps(ROWS), "is a Python pickle, which runs code when it is read"),
        (b"%PDF-1.7", "is a PDF document"),
        (b"\xd0\xcf\x11\xe0", "is an old Office document"),
        (b"(\xb5/\xfd", "is compressed (zstd)"),
        (b"SQLite format 3\0", "is a database (SQLite)"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("\ufeff{}".encode("utf-16-le"), "is text in UTF-16"),
        (b"\0" * 257 + b"ustar", "is an archive (tar)"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_wrong_kind_of_file_is_called_what_it_is(tmp_path, name, content, says):
    with pytest.raises(DataError) as caught:
        read(put(tmp_path / name, content))
    assert says in str(caught.value) and caught.value.code == 2


def test_a_folder_without_splits_is_all_of_its_files(tmp_path):
    put(tmp_path / "b" / "two.csv", "text\ntwice\n")
    put(tmp_path / "a.jsonl", LINES)
    put(tmp_path / ".hidden" / "c.jsonl", LINES)
    put(tmp_path / "README.md", "what this is")
    rows = read(tmp_path)
    assert [row.text for row in rows] == ["once", "twice – 語", "twice"] and rows.path == str(tmp_path)
    assert {Path(row.path).name for row in rows} == {"a.jsonl", "two.csv"} and rows.why.startswith("2 files of a folder: ")
    with pytest.raises(DataError, match="no file in .* has a name that says it is of the split test"):
        read(tmp_path, split="test")


def test_a_folder_with_splits_is_its_training_rows(tmp_path):
    put(tmp_path / "data" / "train-00000-of-00002.parquet", parquet(ROWS[:1]))
    put(tmp_path / "data" / "train-00001-of-00002.parquet", parquet(ROWS[1:]))
    put(tmp_path / "data" / "test-00000-of-00001.parquet", parquet([{"text": "never"}]))
    assert [r.text for r in read(tmp_path)] == [r["text"] for r in ROWS]
    assert "the split train of a folder (2 of 3 files)" in read(tmp_path).why
    assert [r.text for r in read(tmp_path, split="test")] == ["never"]
    assert [r.text for r in read(tmp_path, data_files=["data/test-*"])] == ["never"]
    with pytest.raises(DataError, match="has no split validation: its files are of test and train") as caught:
        read(tmp_path, split="validation")
    assert caught.value.code == 2
    with pytest.raises(DataError, match="no file in .* is named like x-"):
        read(tmp_path, data_files=["x-*"])
    for odd in ("", ".", str(tmp_path / "data" / "*.parquet")):
        with pytest.raises(DataError, match=r"which is no pattern of files inside .*: write one such as data/\*.jsonl") as caught:
            read(tmp_path, data_files=[odd])
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("path", "says"), [("", "path of the data set is empty"), ("x" * 300, "cannot be looked for (File name too long)")]
)
def test_what_no_path_can_be(path, says):
    with pytest.raises(DataError) as caught:
        read(path)
    assert says in str(caught.value) and caught.value.code == 2


def test_patterns(tmp_path):
    put(tmp_path / "one.jsonl", LINES)
    put(tmp_path / "two.jsonl", LINES)
    put(tmp_path / "other.txt", "no\n")
    assert len(read(f"{tmp_path}/*.jsonl")) == 4 and read(f"{tmp_path}/*.jsonl").why.startswith("2 files of a pattern: ")
    with pytest.raises(DataError, match=r"no file is named like .*\*\.csv"):
        read(f"{tmp_path}/*.csv")
    put(tmp_path / "odd[1].jsonl", LINES)
    assert len(read(tmp_path / "odd[1].jsonl")) == 2  # a file that is there is no pattern


def test_files_of_two_kinds_of_rows_are_not_mixed(tmp_path):
    put(tmp_path / "a.jsonl", LINES)
    put(tmp_path / "b.csv", "prompt,completion\nhi,ho\n")
    with pytest.raises(DataError, match=r"holds messages rows \(.*b\.csv\) and text rows \(.*a\.jsonl\)"):
        read(tmp_path)


def test_splits_and_names_are_no_choices_inside_a_file(tmp_path):
    file = put(tmp_path / "a.jsonl", LINES)
    for key, value in (("split", "train"), ("name", "en"), ("data_files", ["a"])):
        with pytest.raises(DataError, match=f"is one file, and {key} is a choice inside a folder") as caught:
            read(file, **{key: value})
        assert caught.value.code == 2


CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: s/*.jsonl}
- config_name: large
  data_files:
  - {split: train, path: l/a.jsonl}
  - {split: test, path: l/b.jsonl}
---
rows
"""


@pytest.fixture
def cached(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_folder_in_the_form_of_the_hub(tmp_path, cached):
    folder = tmp_path / "d"
    put(folder / "README.md", CARD)
    put(folder / "s" / "x.jsonl", '{"text": "small"}\n')
    put(folder / "l" / "a.jsonl", LINES)
    put(folder / "l" / "b.jsonl", '{"text": "never"}\n')
    assert [r.text for r in read(folder, name="small")] == ["small"]
    large = read(folder, name="large")
    assert [r.text for r in large] == [r["text"] for r in ROWS] and large[1].line == 2 and large.path == f"{folder}[large/train]"
    assert [r.text for r in read(folder, name="large", split="test")] == ["never"]
    with pytest.raises(DataError, match=r"the data set .*\[large/dev\] cannot be read: Unknown split") as caught:
        read(folder, name="large", split="dev")
    assert caught.value.code == 2
    with pytest.raises(DataError, match="Config name is missing"):
        read(folder)


def test_a_folder_that_datasets_wrote(tmp_path, cached):
    import datasets

    datasets.DatasetDict({k: datasets.Dataset.from_list(ROWS) for k in ("train", "test")}).save_to_disk(tmp_path / "d")
    assert [r.text for r in read(tmp_path / "d", split="test")] == [r["text"] for r in ROWS]
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "d", split="dev")


def test_a_hub_id_that_cannot_be_reached(cached):
    with pytest.raises(DataError, match=r"nobody/nothing\[train\]") as caught:
        read("nobody/nothing")
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="data/none.jsonl is not there"):
        read("data/none.jsonl")
