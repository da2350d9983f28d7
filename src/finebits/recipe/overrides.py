"""Overrides: values that a command line or a call lays over a recipe, each "section.key=value" with a value in YAML."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

from pydantic import AliasChoices

from finebits import registry
from finebits.recipe.keys.adapter import Adapter
from finebits.recipe.schema import Keys, default, leaves
from finebits.recipe.source import Keypath, Place, Problem, Source, Tree, came, dotted


def lay(tree: Tree, text: str, where: str = "command line") -> None:
    """Lay "section.key=value" over the data; the value is YAML. `where` is what mistakes call the place that it was written at.

    >>> tree = Tree.read(Source("recipe.yaml", "adapter: {r: 8}"))
    >>> lay(tree, "adapter.rank=16")  # of two spellings of one key, the later counts
    >>> tree.data, tree.at(("adapter", "rank")).where
    ({'adapter': {'rank': 16}}, 'command line')
    """
    source = Source(where, text, numbered=False)
    written, sign, value = text.partition("=")
    if not sign:
        tree.problems.append(Problem(f"an override is written section.key=value, and {text!r} came", Place(source, 0, 0, len(text))))
        return
    path = _resolve(tree, written, Place(source, 0, 0, len(written)))
    if path is None:
        return
    if not value.strip():  # a variable of the shell that is not set
        tree.problems.append(Problem(f"{dotted(path)} is given no value: write one, or null for none", Place(source, 0, 0, len(text))))
        return
    node = _descend(tree, path, Place(source, 0, 0, len(written)))
    if node is None:
        return
    for places in (tree.keys, tree.values):
        for old in [p for p in places if p[: len(path)] == path]:
            del places[old]
    _drop_spellings(path, node)
    tree.keys[path] = Place(source, 0, 0, len(written))
    new = tree.compose(source, value, len(written) + 1, path)
    if isinstance(path[-1], int) and isinstance(node, list):
        node[path[-1] : path[-1] + 1] = [new]
    else:
        node[path[-1]] = new


def _resolve(tree: Tree, written: str, place: Place) -> Keypath | None:
    parts = written.strip().split(".")
    parts[0] = parts[0].replace("-", "_")
    if parts[0] not in Keys.model_fields:
        sections = leaves().get(parts[0], ())
        if len(sections) > 1:
            where = " and ".join(f"{s}.{parts[0]}" for s in sections)
            tree.problems.append(Problem(f"{parts[0]} is a key of more than one section: write {where}", place))
            return None
        parts = [*sections, *parts]
    if parts[:2] in (["quantization", "overrides"], ["quantization", "locks"]) and len(parts) > 2:
        return ("quantization", parts[1], ".".join(parts[2:]))  # an expression, or a module's name, stays as it is
    return tuple(int(p) if re.fullmatch("[0-9]{1,9}", p) else p.replace("-", "_") for p in parts)


def _descend(tree: Tree, path: Keypath, place: Place) -> Any:
    """The container that the last part of `path` goes into; made where it is missing. None after a problem."""
    node: Any = tree.data
    for i, part in enumerate(cast(tuple[Any, ...], path[:-1])):  # a name in a mapping, a number in a list
        here = path[: i + 1]
        child = node.get(part) if isinstance(node, dict) else node[part] if part < len(node) else None
        if child is None:
            child = _own_start(tree.data) if here == ("adapter", "init") else default(here)
            child = ([] if isinstance(path[i + 1], int) else {}) if child is None else child
            tree.keys[here] = tree.values[here] = place
        if isinstance(child, str) and isinstance(path[i + 1], str) and _names_method(here):
            child = {"paper": child}
        if isinstance(node, list):
            node[part : part + 1] = [child]
        else:
            node[part] = child
        node, wanted = child, path[i + 1]
        if not isinstance(node, list if isinstance(wanted, int) else dict):
            tree.problems.append(Problem(f"{dotted(here)} has no entry {wanted!r}: it is {came(node)}", place))
            return None
        if isinstance(wanted, int) and wanted > len(node):
            tree.problems.append(Problem(f"{dotted(here)} has no entry {wanted}: the next one is {len(node)}", place))
            return None
    return node


def _drop_spellings(path: Keypath, node: Any) -> None:
    """An override of adapter.rank also replaces an r in the file."""
    if path[:1] == ("adapter",) and len(path) == 2:
        for field in Adapter.model_fields.values():
            alias = field.validation_alias
            if isinstance(alias, AliasChoices) and path[1] in alias.choices:
                for choice in alias.choices:
                    node.pop(choice, None)


def _own_start(data: Mapping[str, Any]) -> str | None:
    """The name of the start that the adapter of a recipe takes by itself; None where there is no such adapter."""
    adapter = data.get("adapter", {})
    paper = adapter.get("paper", Adapter.model_fields["paper"].default)
    if paper not in registry.names("adapters"):
        return None
    cls = registry.load("adapters", paper)
    return cls(**{k: v for k, v in adapter.items() if k == "train" and k in inspect.signature(cls).parameters}).own


def _names_method(path: Keypath) -> bool:
    """Whether a name at `path` stands for a method, whose settings can follow."""
    single = (
        ("adapter", "init"),
        ("adapter", "ranks"),
        ("quantization", "quantizer"),
        ("quantization", "pricing"),
        ("quantization", "planner"),
    )
    several = (("rules",), ("adapter", "refine"), ("adapter", "inits"), ("adapter", "choose"), ("federation", "aggregators"))
    return path in single or path[:-1] in several
