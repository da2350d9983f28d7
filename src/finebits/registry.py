"""The folder is the registry: one method = one file = one public class.

`{"paper": "lora_ga", "gamma": 16}` in a plan resolves to the module `finebits.init.lora_ga` and its one public class `LoRAGA`; the file is
named as the class, in lower case, underscores allowed. Files whose names begin with an underscore, and `base`, hold no method; what an
underscored file does hold is a family of small values that methods have as settings, known by their class names in lower case.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

from finebits.errors import Invalid

SHAPES = ("formats", "quantizers", "init", "adapters", "stats", "planners", "ranks", "rules", "refine", "pruners", "federate")
OPEN = (
    "export",
    "optim",
    "objectives",
    "data.forms",
    "tasks",
    "peft_forms",
    "merging",
)  # folders of what is no paper: found in the same way, and public under no name
PLAIN: dict[Any, Any] = {"int": int, "float": (int, float), "bool": bool}  # annotations of settings that are checked as they are read
MOST = 2**40
HERE = Path(__file__).parent


@functools.cache
def names(shape: str) -> tuple[str, ...]:
    """The methods of one shape, by file name.

    >>> "lora_ga" in names("init"), "base" in names("init")
    (True, False)
    """
    files = (m.name for m in pkgutil.iter_modules([str(_folder(shape))]))
    return tuple(sorted(n for n in files if not n.startswith("_") and n != "base"))


def _folder(shape: str) -> Path:
    return HERE.joinpath(*shape.split("."))


@functools.cache
def load(shape: str, name: str) -> type:
    """The one public class of `finebits/<shape>/<name>.py`, or a member of a family.

    >>> load("init", "lora_ga") is fb.LoRAGA
    True
    >>> load("formats", "double")().__class__.__name__  # of a family: a setting, public under no name of its own
    'Double'
    """
    if name in family(shape):
        return family(shape)[name]
    if name not in names(shape):
        known = (*names(shape), *family(shape))
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        hint = next((f" {name} is one of {other}." for other in SHAPES if name in names(other)), hint)
        raise Invalid(f"finebits has no {shape} method {name!r}.{hint} Known: {', '.join(known)}.")
    module = importlib.import_module(f"finebits.{shape}.{name}")
    wanted = name.replace("_", "")
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__ and value.__name__.lower() == wanted:
            return value
    raise ImportError(f"finebits/{shape}/{name}.py defines no class named like the file")


@functools.cache
def family(shape: str) -> dict[str, type]:
    """The dataclasses of a shape's underscored files, by class name in lower case: settings of methods, such as scale stores.

    >>> sorted(family("formats"))
    ['clustered', 'double', 'e4m3', 'plain', 'pow2']
    """
    files = [m.name for m in pkgutil.iter_modules([str(_folder(shape))]) if m.name.startswith("_")]
    modules = [importlib.import_module(f"finebits.{shape}.{name}") for name in files]
    members = (v for m in modules for v in vars(m).values() if isinstance(v, type) and v.__module__ == m.__name__)
    return {v.__name__.lower(): v for v in members if dataclasses.is_dataclass(v)}


def find(class_name: str) -> type | None:
    """A method by its class name, whatever its shape; nothing else is imported.

    >>> find("LoRAGA").__module__, find("Nobody")
    ('finebits.init.lora_ga', None)
    """
    for shape in SHAPES:
        for name in names(shape):
            if name.replace("_", "") == class_name.lower():
                cls = load(shape, name)
                return cls if cls.__name__ == class_name else None
    return None


def head(shape: str, name: str) -> str:
    """The first line of a method's file: title, authors, venue, number. Read without importing it.

    >>> head("init", "milora").split(":")[0]
    'MiLoRA'
    """
    text = ast.get_docstring(ast.parse((_folder(shape) / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def to_json(value: Any) -> Any:
    """A method value (a dataclass) -> {"paper": name, its fields}; None stays None, and a field that is None by default is left out.

    >>> to_json(fb.LoRA(rank=8)), to_json(None)
    ({'paper': 'lora', 'rank': 8, 'alpha': 16.0, 'scaling': 'lora'}, None)
    """
    if value is None:
        return None
    name = type(value).__module__.rsplit(".", 1)[-1]
    if name.startswith("_"):
        name = type(value).__name__.lower()
    fields = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value) if f.init}
    return {"paper": name} | {k: _data(v) for k, (v, default) in fields.items() if v is not None or default is not None}


def _data(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_data(v) for v in value]
    return to_json(value) if dataclasses.is_dataclass(value) else value


def from_json(shape: str, data: Any) -> Any:
    """The inverse of `to_json`. Nested methods, and lists of them, belong to the same shape; a list becomes a tuple.

    >>> from_json("formats", {"paper": "nf", "bits": 3}) == fb.NF(3), from_json("init", "zeros") == fb.Zeros()
    (True, True)
    """
    if data is None:
        return None
    if isinstance(data, str):
        data = {"paper": data}
    if not isinstance(data, dict) or not isinstance(data.get("paper"), str):
        raise Invalid(f"a {shape} entry needs the key 'paper', one of {', '.join(names(shape))}; got {data}")

    def value(v: Any) -> Any:
        return tuple(value(x) for x in v) if isinstance(v, list) else from_json(shape, v) if isinstance(v, dict) else v

    fields = {k: value(v) for k, v in data.items() if k != "paper"}
    cls = load(shape, data["paper"])
    known = list(inspect.signature(cls).parameters)
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise Invalid(f"{data['paper']} has no setting {key!r}.{hint} Known: {', '.join(known) or 'none'}.")
    types = {f.name: f.type for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    for key, v in fields.items():
        wanted = types.get(key)
        if wanted in PLAIN and not (isinstance(v, PLAIN[wanted]) and (wanted == "bool") == isinstance(v, bool) and abs(v) < MOST):
            raise Invalid(f"{key} of {data['paper']} is {v!r}, and it is to be of type {wanted}")
    try:
        return cls(**fields)
    except Invalid:
        raise
    except (TypeError, ValueError, AttributeError) as e:
        raise Invalid(f"{data['paper']} cannot be made of {str(fields)[:200]} ({e})") from None


SPELLED = re.compile(r"(?P<paper>[a-z_]+)(?P<bits>\d+)(?P<asymmetric>a?)(?:-b(?P<block>\d+))?(?:-(?P<scale>[a-z]+\d*))?")


def spelled(name: str) -> dict[str, Any]:
    """The entry of a number format out of its short name. Raises ValueError where it is none.

    >>> spelled("nf3-b64-bf16")
    {'paper': 'nf', 'bits': 3, 'block': 64, 'scale': 'bf16'}
    >>> spelled("int4a-b32")  # a: asymmetric
    {'paper': 'int', 'bits': 4, 'symmetric': False, 'block': 32}
    """
    match = SPELLED.fullmatch(name)
    if not match:
        raise Invalid(f"a format is written like nf4, nf3-b64, int4a-b32 or nf2-b64-bf16, and {name!r} came")
    entry: dict[str, Any] = {"paper": match["paper"], "bits": int(match["bits"])}
    if match["paper"] + match["bits"] in names("formats"):
        entry = {"paper": match["paper"] + match["bits"]}
    entry |= {"symmetric": False} if match["asymmetric"] else {}
    entry |= {"block": int(match["block"])} if match["block"] else {}
    return entry | ({"scale": match["scale"]} if match["scale"] else {})
