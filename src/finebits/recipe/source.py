"""YAML 1.2 with the place of everything in it: what a recipe and its overrides are read by.

PyYAML reads YAML 1.1, where 0512 is octal, 1:30 is ninety, 1_000 is a number, no is false and 1e-4 is text. Here the core schema of YAML 1.2
decides (https://yaml.org/spec/1.2.2/#103-core-schema): 0512 is 512, 0o17 is 15, 1e-4 is a number, and the others are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.scanner import ScannerError

from finebits.errors import Invalid

Keypath = tuple[str | int, ...]

TAG = "tag:yaml.org,2002:"
SCALARS = (  # (tag, what it looks like, what it may begin with)
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
)
DIGITS = 4300  # Python reads no longer numbers
DEPTH = 100  # of lists and maps in brackets
SHOWN = 20  # mistakes; a file that is none of ours has no end of them


@dataclass(frozen=True)
class Source:
    """Where a text came from: a file, or an override of the command line (`numbered` is false then).

    >>> Tree.read(Source("a.yaml", "data: {max_length: 256}")).at(("data", "max_length")).where
    'a.yaml:1:20'
    """

    name: str
    text: str
    numbered: bool = True


@dataclass(frozen=True)
class Place:
    """Some characters of one line; `line` and `column` count from 0."""

    source: Source
    line: int
    column: int
    width: int

    @property
    def where(self) -> str:
        """file:line:column, counted from 1.

        >>> Place(Source("a.yaml", "rank: 8"), 0, 0, 4).where, Place(Source("command line", "rank=8", numbered=False), 0, 0, 4).where
        ('a.yaml:1:1', 'command line')
        """
        return f"{self.source.name}:{self.line + 1}:{self.column + 1}" if self.source.numbered else self.source.name

    def excerpt(self, note: str = "") -> str:
        """The line, the one before it, and a caret under what is meant.

        >>> print(Place(Source("a.yaml", "data: {max_lenght: 256}"), line=0, column=7, width=10).excerpt("did you mean max_length?"))
             1 | data: {max_lenght: 256}
               |        ^^^^^^^^^^ did you mean max_length?
        """
        lines = self.source.text.splitlines() or [""]
        line = min(self.line, len(lines) - 1)
        shown = range(max(0, line - 1), line + 1)
        number = {i: f"{i + 1:6} | " if self.source.numbered else "       | " for i in shown}
        width = max(1, min(self.width, len(lines[line]) - self.column))
        caret = "       | " + " " * self.column + "^" * width + (f" {note}" if note else "")
        return "\n".join([*(f"{number[i]}{lines[i]}".rstrip() for i in shown), caret])


@dataclass(frozen=True)
class Problem:
    """One mistake: a sentence, where, and what may have been meant.

    >>> str(Problem("there is no recipe at a.yaml", note="make one")), Problem("it is empty").to_json()
    ('there is no recipe at a.yaml: make one', {'message': 'it is empty', 'note': ''})
    """

    message: str
    place: Place | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.place is None:
            return f"{self.message}" + (f": {self.note}" if self.note else "")
        return f"{self.place.where}   {self.message}\n{self.place.excerpt(self.note)}"

    def to_json(self) -> dict[str, Any]:
        place = self.place
        where = {"source": place.source.name, "line": place.line + 1, "column": place.column + 1} if place else {}
        return {"message": self.message, "note": self.note, **where}


class RecipeError(Invalid):
    """Every mistake found in a recipe and its overrides.

    >>> RecipeError([Problem("one mistake"), Problem("another")]).problems[1].message
    'another'
    """

    code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        super().__init__("\n".join([*(str(p) for p in problems[:SHOWN]), *more]))
        self.problems = list(problems)

    def data(self) -> dict[str, Any]:
        return {"problems": [problem.to_json() for problem in self.problems]}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= DEPTH:  # PyYAML takes the square of it
            raise ScannerError(None, None, f"values lie more than {DEPTH} deep in each other", self.get_mark())
        super().fetch_flow_collection_start(token)

    def integer(self, node: yaml.ScalarNode) -> int:
        text = node.value
        if len(text) > DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text):,} digits is too long", node.start_mark)
        return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)

    def real(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also puts in quotes what YAML 1.2 would read as another thing than text."""

    yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for _tag, _looks, _first in SCALARS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(TAG + _tag, re.compile(rf"(?:{_looks})\Z"), _first)
Loader.add_constructor(TAG + "int", Loader.integer)
Loader.add_constructor(TAG + "float", Loader.real)


def compose(source: Source, text: str, shift: int) -> yaml.Node | Problem | None:
    """The nodes of a text that stands `shift` characters into its source; None if it is empty, a problem if it is not YAML.

    >>> source = Source("a.yaml", "{a: 1")
    >>> compose(source, source.text, 0).message
    "this is not YAML: expected ',' or '}', but got '<stream end>'"
    """
    try:
        return Loader(text).get_single_node()
    except yaml.MarkedYAMLError as e:
        return broken(source, e, shift)
    except yaml.reader.ReaderError as e:  # its character is a number where the text is one of characters
        line = text.count("\n", 0, e.position)
        column = e.position - (text.rfind("\n", 0, e.position) + 1)
        message = f"this is not YAML: the character #x{int(e.character):04x} is not allowed"
        return Problem(message, Place(source, line, column + shift, 1))
    except RecursionError:
        return Problem(f"{source.name} is nested too deeply to be a recipe")


def broken(source: Source, error: yaml.MarkedYAMLError, shift: int) -> Problem:
    """What PyYAML found, at its place."""
    mark = error.problem_mark or error.context_mark
    place = Place(source, mark.line, mark.column + shift, 1) if mark else None
    return Problem(f"this is not YAML: {error.problem or error.context}", place)


def place_of(node: yaml.Node, source: Source, shift: int) -> Place:
    start, end = node.start_mark, node.end_mark
    width = end.column - start.column if end.line == start.line else 1 << 16
    return Place(source, start.line, start.column + shift, width)


class Tree:
    """Plain data, and for every key and value the place that it was written at.

    >>> tree = Tree.read(Source("a.yaml", "{seed: 0512, lr: 1e-4, warm: no}"))  # by the rules of YAML 1.2
    >>> tree.data
    {'seed': 512, 'lr': 0.0001, 'warm': 'no'}
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.data: dict[str, Any] = {}
        self.keys: dict[Keypath, Place] = {}
        self.values: dict[Keypath, Place] = {}
        self.problems: list[Problem] = []

    @classmethod
    def read(cls, source: Source) -> Tree:
        """The tree of a whole text, which must hold sections of keys.

        >>> Tree.read(Source("a.yaml", "- 1")).problems[0].message
        'a.yaml wants sections of keys, and a list came'
        """
        tree = cls(source.name)
        data = tree.compose(source, source.text, 0, ())
        if isinstance(data, dict):
            tree.data = data
        elif not tree.problems:
            what = "it is empty" if data is None else f"{came(data)} came"
            tree.problems.append(
                Problem(f"{source.name} wants sections of keys, and {what}", None, "begin with model: and model_name_or_path:")
            )
        return tree

    def at(self, path: Keypath) -> Place | None:
        """Where the value at `path`, or the nearest thing around it, was written.

        >>> tree = Tree.read(Source("a.yaml", "data: {max_length: 256}"))
        >>> tree.at(("data", "held_out")) == tree.at(("data",))  # what is not there is where it would be
        True
        """
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path) if path else None

    def compose(self, source: Source, text: str, shift: int, path: Keypath) -> Any:
        """The value that a text stands for, which goes to `path`; None after a problem."""
        node = compose(source, text, shift)
        if isinstance(node, Problem):
            self.problems.append(node)
            return None
        if node is None:  # a comment alone, or nothing
            self.values[path] = Place(source, 0, shift, max(1, len(text)))
            return None
        try:
            return self._build(node, source, shift, path, set())
        except yaml.MarkedYAMLError as e:
            self.problems.append(broken(source, e, shift))
        return None

    def _build(self, node: yaml.Node, source: Source, shift: int, path: Keypath, seen: set[int]) -> Any:
        self.values[path] = place_of(node, source, shift)
        if id(node) in seen:
            self.problems.append(Problem("a recipe holds no YAML aliases: write the value out", self.keys.get(path, self.values[path])))
            return None
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            return Loader("").construct_object(node)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            self.problems.append(Problem(f"a recipe holds no YAML tags, and {node.tag} came", self.values[path]))
            return None
        if isinstance(node, yaml.SequenceNode):
            return [self._build(child, source, shift, (*path, i), seen) for i, child in enumerate(node.value)]
        data: dict[str, Any] = {}
        for key_node, child in node.value:
            key, place = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?", place_of(key_node, source, shift)
            if key in data:
                first = self.keys[(*path, key)]
                self.problems.append(Problem(f"{dotted((*path, key))} is there twice, first in line {first.line + 1}", place))
                continue
            self.keys[(*path, key)] = place
            data[key] = self._build(child, source, shift, (*path, key), seen)
        return data


def dotted(path: Iterable[str | int]) -> str:
    """A path as it is written in an override.

    >>> dotted(("quantization", "candidates", 0))
    'quantization.candidates.0'
    """
    return ".".join(map(str, path))


def came(value: Any) -> str:
    """What a sentence calls a value that came.

    >>> came(None), came(True), came({}), came("nf4")
    ('null', 'true', 'a mapping', "'nf4'")
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value) if isinstance(value, (str, int, float)) else str(value)
