"""The examples in docstrings, run: what a reader sees there is what comes out, to the digits that are shown."""

from __future__ import annotations

import ast
import doctest
import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import finebits as fb
from finebits import registry

SRC = Path(fb.__file__).parent
FLOAT = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")


class Digits(doctest.OutputChecker):
    """The same but for lines that are broken elsewhere, and floats that differ by less than 1e-4."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        texts, numbers = ([f(s) for s in (want, got)] for f in (lambda s: "".join(FLOAT.sub("#", s).split()), FLOAT.findall))
        return texts[0] == texts[1] and all(math.isclose(float(a), float(b), rel_tol=1e-4, abs_tol=1e-4) for a, b in zip(*numbers))


def examples() -> Iterator[object]:
    for path in sorted(SRC.rglob("*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)) if ">>>" in source else ():
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text, name = ast.get_docstring(node) or "", getattr(node, "name", "module")
                if ">>>" in text:
                    where = path.relative_to(SRC)
                    yield pytest.param(where, name, text, id=f"{where.with_suffix('')}:{name}")


@pytest.mark.parametrize("path, name, text", list(examples()))
def test_an_example_gives_what_it_shows(path: Path, name: str, text: str) -> None:
    """In its own module, with torch and fb as everyone imports them."""
    module = importlib.import_module(".".join(("finebits", *path.with_suffix("").parts)))
    made = doctest.DocTestParser().get_doctest(text, {**vars(module), "torch": torch, "fb": fb}, name, str(path), 0)
    said: list[str] = []
    doctest.DocTestRunner(Digits(), verbose=False).run(made, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("shape", registry.SHAPES)
def test_every_method_shows_what_it_does(shape: str) -> None:
    silent = [name for name in registry.names(shape) if ">>>" not in (registry.load(shape, name).__doc__ or "")]
    assert registry.names(shape) and not silent


def test_every_public_name_shows_what_it_does() -> None:
    silent = [name for name in fb.PUBLIC if ">>>" not in (getattr(fb, name).__doc__ or "")]
    assert fb.PUBLIC and not silent
