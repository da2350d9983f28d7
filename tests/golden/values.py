"""Golden values: small tensors made by the authors' code. make_*.py beside this file made each *.json, and says from what.

To make one again: clone the repository that the script names, check its commit out, and run the script with the path of that folder. A script
that names a release runs the package that is installed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent


def golden(name: str) -> dict[str, Tensor]:
    """The tensors of one file, in float32."""
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in json.loads((HERE / f"{name}.json").read_text()).items()}


def keep(name: str, **tensors: Any) -> None:
    """Seven digits: more than any comparison looks at."""
    values = {key: [[float(f"{v:.7g}") for v in row] for row in torch.as_tensor(t).float().tolist()] for key, t in tensors.items()}
    (HERE / f"{name}.json").write_text(json.dumps(values, indent=None).replace('], "', '],\n"') + "\n")


def released(package: str, wanted: str) -> None:
    """Raise unless that version of the package is the installed one."""
    if version(package) != wanted:
        raise SystemExit(f"{package} is {version(package)}; these values are of {wanted}")


def checkout(commit: str) -> Path:
    """The folder that the command line names, which has to be at that commit."""
    root = Path(sys.argv[1])
    found = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    if found != commit:
        raise SystemExit(f"{root} is at {found}; these values are of {commit}")
    return root


def authors(commit: str, module: str) -> ModuleType:
    """A module of the checkout; the folder that it lies in is searched for its imports."""
    path = checkout(commit) / module
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def functions(commit: str, script: str, **names: Any) -> dict[str, Any]:
    """The functions of a script of the checkout that cannot be imported, since the rest of it runs; `names` are what they find around them."""
    path = checkout(commit) / script
    defined = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    exec(compile(ast.Module(defined, []), path, "exec"), names)
    return names


def signed(rows: Tensor, like: Tensor) -> Tensor:
    """The sign of every row with which it is nearest to that of `like`: a decomposition leaves it open."""
    return (rows * like).sum(1).sign()
