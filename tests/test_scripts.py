"""Benchmarks and examples are not run by the tests; what they import from finebits must be there all the same."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")])


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_names_from_finebits_exist(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    aliases = {"finebits": "finebits"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "finebits":
            module = importlib.import_module(node.module)
            for wanted in node.names:
                if not hasattr(module, wanted.name):
                    importlib.import_module(f"{node.module}.{wanted.name}")
                found = getattr(module, wanted.name)
                if isinstance(found, type(ast)):
                    aliases[wanted.asname or wanted.name] = found.__name__
        elif isinstance(node, ast.Import):
            aliases |= {a.asname or a.name: a.name for a in node.names if a.name.partition(".")[0] == "finebits"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            module = importlib.import_module(aliases[node.value.id])
            assert hasattr(module, node.attr), f"{file.name}:{node.lineno}: {module.__name__} has no {node.attr}"


def test_there_are_scripts():
    assert len(SCRIPTS) > 5
