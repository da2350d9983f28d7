from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from finebits.data.forms._turns import disorder
from finebits.data.rows import read

SCRIPT = Path(__file__).parents[2] / "examples" / "stdlib_docstrings.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("stdlib_docstrings", SCRIPT)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def made(script, tmp_path_factory):
    """The real data set: its folder and its rows."""
    folder = tmp_path_factory.mktemp("stdlib")
    script.main([str(folder)])
    return folder, *([json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "held_out"))


def body(row) -> str | None:
    """The text below the signature, None where it was cut."""
    shown = row["messages"][0]["content"]
    return None if shown.endswith("...") else re.split(r"\)[^\n]*:[^\n]*\n", shown, maxsplit=1)[-1]


def test_the_two_files_share_no_package_no_body_and_no_answer(made):
    _, train, held_out = made
    assert len(train) > 4000 and len(held_out) >= 100
    for told in (
        lambda row: row["package"],
        lambda row: row["origin"],
        lambda row: row["messages"][0]["content"],
        lambda row: row["messages"][1]["content"],
        body,
    ):
        assert not {told(row) for row in train} & {told(row) for row in held_out} - {None}
    bodies = Counter(body(row) for row in train + held_out)
    del bodies[None]
    assert len(bodies) > 0.5 * len(train) and max(bodies.values()) == 1
    assert max(Counter(row["package"] for row in held_out).values()) <= len(held_out) / 4


def test_answers_are_the_authors_words_and_are_not_in_the_question(made):
    _, train, held_out = made
    root = Path(sysconfig.get_path("stdlib"))
    for row in held_out[:15] + train[:15]:
        name, line = row["origin"].rsplit(":", 1)
        source = (root / name).read_bytes()
        node = next(
            n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.lineno == int(line)
        )
        question, answer = (message["content"] for message in row["messages"])
        whole = ast.get_docstring(node)
        assert whole is not None and whole.strip().startswith(answer) and len(answer) >= 20
        assert (node.body[0].value.value not in question) and f"def {node.name}(" in question


def test_rows_are_readable_in_order_short_and_unsorted(made):
    folder, train, _ = made
    rows = read(folder / "train.jsonl")
    assert rows.format == "messages" and len(rows) == len(train) and not any(disorder(row.messages) for row in rows)
    lengths = [sum(len(message["content"]) for message in row["messages"]) for row in train]
    assert max(lengths) < 700
    rising = sum(a < b for a, b in zip(lengths, lengths[1:], strict=False)) / len(lengths)
    assert 0.4 < rising < 0.6


LIBRARY = {
    "one.py": '''
raise SystemExit("never run")
def plain(x):
    """Return x, after some thought.

    More words that are not kept.
    """

    # a remark
    return x
def same(x):
    """Another docstring of the same body."""
    return x
def short():
    """Too short."""
    return 1
def bare():
    """Nothing but a docstring here."""
def line(): "A docstring on the line of the def."; return 2
\f
class Deep:
    @property
    def inner(self):
        r"""Has a decorator and a \\\\ backslash.
        \t
        Here a paragraph ends at white space."""
        return (self,
            "and more")
''',
    "two/__init__.py": 'def big(x):\n    """Does one thing after another."""\n' + "".join(f"    x += {i}\n" for i in range(200)),
    "three.py": 'def other(y):\n    """Return y, which is not x at all."""\n    return y * 3\n',
    "four.py": "def broken(:\n",
    "test/five.py": 'def tested(y):\n    """This folder is left out of it all."""\n    return y * 5\n',
}


@pytest.fixture
def library(script, tmp_path, monkeypatch):
    """A small standard library; returns the rows that the script makes of it, by function."""
    for name, text in LIBRARY.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(text)
    (tmp_path / "lib" / "six.py").write_bytes(
        b'# coding: latin-1\ndef caf\xe9(z):\n    """Drink a caf\xe9 in the morning."""\n    return z * 6\n'
    )
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))

    def make(*args: str) -> dict[str, tuple[str, str]]:
        script.main([str(tmp_path / "out"), *args])
        rows = [
            json.loads(line) for name in ("train", "held_out") for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        ]
        asked = [(row["messages"][0]["content"].split("\n\n", 1)[1], row["messages"][1]["content"]) for row in rows]
        return {source.split("def ")[1].split("(")[0]: (source, answer) for source, answer in asked}

    make.out = tmp_path / "out"
    return make


def test_what_becomes_of_each_kind_of_function(library, capsys):
    rows = library("--held-out", "1")
    assert set(rows) == {"plain", "inner", "big", "other", "café"}
    assert rows["plain"] == ("def plain(x):\n    # a remark\n    return x", "Return x, after some thought.")
    assert rows["inner"] == (
        '@property\ndef inner(self):\n    return (self,\n        "and more")',
        "Has a decorator and a \\\\ backslash.",
    )
    assert rows["café"][1] == "Drink a café in the morning."
    source, answer = rows["big"]
    assert len(source) + len(answer) < 540 and source.endswith("\n    ...") and "    x += 3\n" in source
    printed = capsys.readouterr().out
    for line in (
        "1 functions whose body came before",
        "1 files that are not Python",
        "1 docstrings of fewer",
        "1 functions that are nothing but",
    ):
        assert line in printed


def test_the_same_library_gives_the_same_files(library):
    library("--held-out", "1")
    before = {path.name: path.read_bytes() for path in library.out.iterdir()}
    library("--held-out", "1")
    assert before == {path.name: path.read_bytes() for path in library.out.iterdir()} and set(before) == {"train.jsonl", "held_out.jsonl"}


def test_too_much_held_out_and_bad_options_are_refused(library):
    with pytest.raises(SystemExit, match="leaves nothing to train on"):
        library("--held-out", "50")
    with pytest.raises(SystemExit):
        library("--max-chars", "3")
