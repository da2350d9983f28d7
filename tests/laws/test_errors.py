"""What finebits raises is its own: an exit code, words for the user, and the exception of Python that a caller expects."""

import ast
import builtins
from pathlib import Path

import pytest

import finebits
from finebits import errors
from finebits.messages import explain

SRC = Path(finebits.__file__).parent
SAID = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
PYTHONS = {"AttributeError", "ImportError", "MemoryError"}  # no such name, a file without its class, no memory: as Python says them
OURS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.FinebitsError)]


def test_nothing_is_raised_that_the_command_would_call_a_fault():
    found = []
    for path in sorted(SRC.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                if isinstance(raised, ast.Name) and raised.id in SAID - PYTHONS:
                    found.append(f"{path.relative_to(SRC)}:{node.lineno} raises {raised.id}: take one of finebits.errors")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_an_error_of_ours_is_said_as_it_is(kind):
    assert issubclass(kind, finebits.FinebitsError)
    said = explain(kind("x is 3; it can be 1 or 2"))
    assert said == ("x is 3; it can be 1 or 2", kind.code, "", {})


def test_the_same_words_of_others_are_a_fault():
    assert explain(ValueError("x")).text.startswith("ValueError: x") and explain(KeyError("x")).code == 1
