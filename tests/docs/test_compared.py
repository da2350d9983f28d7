"""The table of features: every row has its evidence, and every test that is named is there. Files are parsed and not imported."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from doc_pages import ROOT

PAGE = ROOT / "docs" / "compared.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def tables() -> list[list[list[str]]]:
    """Cells of the rows of every table of the page, without their heads."""
    found: list[list[list[str]]] = []
    before = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("|---"):
            found.append([])
        elif line.startswith("|") and before.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        before = line
    return found


@functools.cache
def functions(file: Path) -> frozenset[str]:
    return frozenset(node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef))


def named(text: str) -> Iterator[tuple[str, str]]:
    yield from TEST.findall(text)


def test_both_tables_tell_of_the_same_features() -> None:
    first, second = tables()
    assert [(row[0], row[-1]) for row in first] == [(row[0], row[1]) for row in second] and len(first) == 32
    assert {len(row) for row in first} == {10} and {len(row) for row in second} == {4}
    assert all(cell[0] in "Y~-" for row in first for cell in row[1:])


def test_what_is_there_is_held_by_a_test_and_what_is_not_says_so() -> None:
    for feature, mark, how, by in tables()[1]:
        assert how, feature
        assert mark != "Y" or any(named(by)), f"{feature} names no test"


def test_tests_that_are_named_are_there() -> None:
    absent = [f"{file}::{test}" for file, test in named(PAGE.read_text()) if test not in functions(ROOT / file)]
    assert not absent
