"""Classes and functions of the package as Markdown: signature, docstring, public methods. Files are read and not imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SRC = Path(__file__).parent.parent / "src"
WIDE = 100
PARTS = re.compile(r"(`[^`]*`)")
Named = ast.ClassDef | ast.FunctionDef


def section(module: str, name: str, level: int, methods: bool = True) -> str:
    """A heading, what stands behind it, and for a class its public methods one level below.

    >>> section("finebits.sizes", "parse", 2).splitlines()[0]
    '## parse'
    """
    node = _found(module, name)
    lines = [f"{'#' * level} {name}", "", *_described(node)]
    for part in node.body if methods and isinstance(node, ast.ClassDef) else ():
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and ast.get_docstring(part):
            lines += [f"{'#' * (level + 1)} {name}.{part.name}", "", *_described(part)]
    return "\n".join(lines)


def _found(module: str, name: str) -> Named:
    """Where a name is defined, through imports of it by its module."""
    path = SRC.joinpath(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, Named) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            return _found(node.module, next(a.name for a in node.names if (a.asname or a.name) == name))
    raise LookupError(f"{module} defines no class or function {name}")


def _described(node: Named) -> list[str]:
    doc = ast.get_docstring(node) or ""
    return ["```python", signature(node), "```", "", *([markdown(doc), ""] if doc else [])]


def signature(node: Named) -> str:
    """As it is written; of a class what makes one.

    >>> signature(ast.parse("class A:\\n    x: int = 3\\n    n: ClassVar[int] = 1").body[0])
    'class A(x: int = 3)'
    """
    if isinstance(node, ast.FunctionDef):
        of_class = bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
        kind = "property" if any(ast.unparse(d).endswith("property") for d in node.decorator_list) else "def"
        returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        given = list(_parameters(node.args))[of_class:]
        return f"{node.name}{returned.replace(' ->', ':')}" if kind == "property" else _call(f"def {node.name}", given, returned)
    made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)]
    given = list(_parameters(made.args))[1:] if made else [ast.unparse(n) for n in fields if not ast.unparse(n.target).startswith("_")]
    return _call(f"class {node.name}", given, "")


def _parameters(args: ast.arguments) -> Iterator[str]:
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    yield from (_parameter(a, d) for a, d in zip(plain, defaults))
    if args.vararg or args.kwonlyargs:
        yield f"*{ast.unparse(args.vararg)}" if args.vararg else "*"
    yield from (_parameter(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults))
    if args.kwarg:
        yield f"**{ast.unparse(args.kwarg)}"


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(arg) + (f"{' = ' if arg.annotation else '='}{ast.unparse(default)}" if default else "")


def _call(name: str, given: list[str], returned: str) -> str:
    line = f"{name}({', '.join(given)}){returned}"
    return line if len(line) <= WIDE else f"{name}(\n" + "".join(f"    {one},\n" for one in given) + f"){returned}"


def markdown(text: str) -> str:
    """Plain text of a docstring as Markdown: what is indented is a formula, what begins with >>> an example, a line with a dash an item.

    >>> markdown("b_c\\n\\n    ŵ = γ\\n\\nDeviations:\\n- one;\\n  still one.")
    'b\\\\_c\\n\\n```text\\nŵ = γ\\n```\\n\\nDeviations:\\n\\n- one;\\n  still one.'
    """
    lines: list[str] = []
    inside = ""
    for line in text.splitlines():
        was, inside = inside, _kind(line, inside)
        if was and inside != was:
            while not lines[-1].strip():
                lines.pop()
            lines += ["```", ""]
        if inside and inside != was:
            lines += ["", f"```{inside}"]
        if inside:
            lines.append(line.removeprefix("    ") if inside == "text" else line)
            continue
        item = line.startswith(("- ", "* "))
        if item and lines and lines[-1].strip() and not lines[-1].startswith(("- ", "  ")):
            lines.append("")
        lines.append(f"- {prose(line[2:])}" if item else prose(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, "```"] if inside else lines)).strip()


def _kind(line: str, inside: str) -> str:
    """What a line is part of: an example ends with an empty line, a formula where a line is not indented."""
    if line.startswith(">>>") or (inside == "pycon" and line.strip()):
        return "pycon"
    return "text" if line.startswith("    ") or (inside == "text" and not line.strip()) else ""


def prose(text: str) -> str:
    """Text in which Markdown's signs stand for themselves, outside of backticks; numbers of arXiv are links.

    >>> prose("a < b")
    'a &lt; b'
    >>> prose("a_b `c_d` arXiv:1603.05279v4")
    'a\\\\_b `c_d` [arXiv:1603.05279v4](https://arxiv.org/abs/1603.05279v4)'
    """
    parts = PARTS.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*_\[\]|])", r"\\\1", parts[i]).replace("<", "&lt;").replace(">", "&gt;")
        parts[i] = re.sub(r"arXiv:(\d{4}\.\d{4,5}(?:v\d+)?)", r"[arXiv:\1](https://arxiv.org/abs/\1)", parts[i])
    return "".join(parts)
