"""The pages of the site, in a folder of their own: those that are written, and those that follow from the code.

    python docs/_generate.py [OUT_DIR]        build if none is given; then: zensical build -f build/site.yml --strict

A method's page is the head of its file; keys of recipes come from the schema, commands from their own help, Python's names from docstrings
(docs/_python.py). Nothing of this is kept in the repository.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from _python import markdown, prose, section

from finebits import PUBLIC, cli, registry
from finebits.cli import _command

HERE = Path(__file__).parent
ROOT = HERE.parent
COPIED = (".md", ".svg", ".png", ".css", ".ipynb")
OUTSIDE = {"CHANGELOG.md": "changelog.md"}  # pages that lie above this folder, and what they are called on the site
SHAPES = (*registry.SHAPES, *registry.OPEN)
WHERE = {  # what of a recipe names the methods of a shape
    "formats": "quantization.candidates",
    "quantizers": "quantization.quantizer",
    "init": "adapter.init",
    "adapters": "adapter.paper",
    "planners": "quantization.planner",
    "ranks": "adapter.ranks",
    "rules": "rules",
    "refine": "adapter.refine",
    "export": "export.to",
    "optim": "training.optim",
    "objectives": "training.loss",
    "tasks": "task",
}


def main(out: Path) -> None:
    """Write all pages to `out`/pages, and beside them the site's configuration with them in its navigation."""
    pages = out / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    for name, text in written():
        path = pages / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    site = yaml.safe_load((HERE / "site.yml").read_text(encoding="utf-8"))
    placed(site["nav"], {"methods": methods_nav(), "decisions": decisions_nav()})
    site |= {"docs_dir": "pages", "site_dir": "site"}
    (out / "site.yml").write_text(yaml.safe_dump(site, sort_keys=False, allow_unicode=True), encoding="utf-8")


def written() -> Iterator[tuple[str, str | bytes]]:
    """(name under pages, what it holds) of every page and picture."""
    for path in sorted(p for p in HERE.rglob("*") if p.suffix in COPIED):
        name = path.relative_to(HERE).as_posix()
        if path.suffix == ".ipynb":
            yield name, path.read_bytes()  # to be downloaded
            yield name.removesuffix(".ipynb") + ".md", notebook(json.loads(path.read_text(encoding="utf-8")), path.name)
        else:
            yield name, path.read_bytes()
    for name, at in OUTSIDE.items():
        yield at, (ROOT / name).read_text(encoding="utf-8")
    yield "methods/index.md", methods_index()
    for shape in SHAPES:
        for name in registry.names(shape):
            yield page_of(shape, name), method(shape, name)
    yield "reference/recipe.md", recipe_keys()
    yield "reference/commands.md", commands()
    yield "reference/python.md", python()


def placed(nav: Any, filled: Mapping[str, list[Any]]) -> None:
    """Put the generated parts of the navigation where site.yml has their names."""
    for item in nav:
        for key, value in item.items() if isinstance(item, dict) else ():
            if isinstance(value, list):
                placed(value, filled)
            elif value in filled:
                item[key] = filled[value]


# -- methods


def page_of(shape: str, name: str) -> str:
    return f"methods/{shape.replace('.', '_')}/{name}.md"


def methods_nav() -> list[Any]:
    return ["methods/index.md", *({shape: [{n: page_of(shape, n)} for n in registry.names(shape)]} for shape in SHAPES)]


def methods_index() -> str:
    lines = ["# Methods", "", "One method is one file of the package; its page is the head of that file. `finebits list` prints the same."]
    for shape in SHAPES:
        about = ROOT / "src" / "finebits" / shape.replace(".", "/") / "base.py"
        head = (ast.get_docstring(ast.parse(about.read_text(encoding="utf-8"))) or "").split("\n\n")[0] if about.exists() else ""
        lines += ["", f"## {shape}", "", prose(" ".join(head.split()))]
        lines += [f"In a recipe: `{WHERE[shape]}`."] if shape in WHERE else []
        lines += [""]
        for name in registry.names(shape):
            link = page_of(shape, name).removeprefix("methods/")
            lines.append(f"- [`{name}`]({link}) {prose(registry.head(shape, name))}")
    return "\n".join(lines) + "\n"


def method(shape: str, name: str) -> str:
    """The page of one method: its file's head, how it is named, and its class with the settings and an example.

    >>> method("init", "loftq").splitlines()[0]
    '# loftq'
    """
    path = ROOT.joinpath("src", "finebits", *shape.split("."), f"{name}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = [f"# {name}", "", markdown(ast.get_docstring(tree) or ""), ""]
    if shape in WHERE:
        lines += [f"In a recipe: `{name}` under `{WHERE[shape]}`; its settings are those of the class below.", ""]
    wanted = name.replace("_", "")
    classes = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name.lower() == wanted]
    lines += [section(f"finebits.{shape}.{name}", cls, 2, methods=False) for cls in classes]
    lines += ["", f"The file: `src/finebits/{shape.replace('.', '/')}/{name}.py`"]
    return "\n".join(lines) + "\n"


# -- decisions


def decisions_nav() -> list[Any]:
    return ["decisions/index.md", *(f"decisions/{p.name}" for p in sorted((HERE / "decisions").glob("[0-9]*.md")))]


# -- notebooks


def notebook(data: Mapping[str, Any], name: str) -> str:
    """A notebook as a page: its text and its code; what comes out is where it is run.

    >>> notebook({"cells": [{"cell_type": "code", "source": ["1 + 1"]}]}, "a.ipynb").splitlines()[0]
    '```python'
    """
    parts = []
    for cell in data["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*parts, f"[The notebook itself]({name}){{ download }}"]) + "\n"


# -- reference


def recipe_keys() -> str:
    """Every key of a recipe, by section."""
    from finebits.recipe import Recipe

    schema = Recipe.model_json_schema()
    lines = [
        "# Keys of a recipe",
        "",
        "`finebits recipe schema` prints them as a JSON Schema for editors; one that is not known is an error.",
    ]
    shown: list[tuple[str, Mapping[str, Any]]] = []
    own = {k: v for k, v in schema["properties"].items() if not _section(schema, v)}
    shown.append(("", {"properties": own}))
    shown += [(key, _section(schema, value)) for key, value in schema["properties"].items() if _section(schema, value)]
    while shown:
        section, about = shown.pop(0)
        lines += ["", f"## {section}" if section else "## On top", ""]
        lines += [prose(" ".join(about["description"].split())), ""] if about.get("description") and section else []
        lines += ["| key | default | what |", "|---|---|---|"]
        for key, value in about["properties"].items():
            inner = _section(schema, value)
            if inner:
                shown.insert(0, (f"{section}.{key}".strip("."), inner))
            default = json.dumps(value["default"], ensure_ascii=False) if "default" in value and not inner else ""
            choices = value.get("enum") or [c for one in value.get("anyOf", ()) for c in one.get("enum", ())]
            what = prose(" ".join(str(value.get("description", "")).split()))
            what += f" One of {', '.join(f'`{c}`' for c in choices)}." if choices else ""
            lines.append(f"| `{key}` | {_cell(default)} | {what} |")
    return "\n".join(lines) + "\n"


def _section(schema: Mapping[str, Any], value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section that a key holds, itself, in a list or in the place of null; {} where it holds a value."""
    for one in (value, value.get("items", {}), *value.get("anyOf", ()), *value.get("allOf", ())):
        if "$ref" in one:
            found = schema["$defs"][one["$ref"].rpartition("/")[2]]
            return found if "properties" in found else {}
    return {}


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`" if text else ""


def commands() -> str:
    """The help of every verb, as it is printed."""
    lines = ["# Commands", "", "What `--help` prints. `--format json` makes a result one object; results go to stdout, progress to stderr."]
    for verb, file in _command.verbs().items():
        named = _command.parts(file)
        parts = [[verb]] if len(named) == 1 else [[verb], *([verb, part.__name__] for part in named)]
        for words in parts:
            lines += ["", f"{'#' * (1 + len(words))} {' '.join(words)}", "", "```text", helped(words), "```"]
    return "\n".join(lines) + "\n"


def helped(words: list[str]) -> str:
    """What `finebits WORDS --help` prints."""
    os.environ |= {"COLUMNS": "110", "NO_COLOR": "1"}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = cli.main([*words, "--help"])
    if code:
        raise SystemExit(f"finebits {' '.join(words)} --help ended with {code}")
    return said.getvalue().strip()


def python() -> str:
    """The public names; methods are public too, each on its own page."""
    lines = ["# Python", "", "`import finebits as fb`; every name below is `fb.NAME`. Methods are public under their class names too, and"]
    lines += ["[have pages of their own](../methods/index.md). Every example runs as a test.", ""]
    return "\n".join([*lines, *(section(module, name, 2) for name, module in sorted(PUBLIC.items(), key=lambda p: p[0].lower()))])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build")
