"""Real rows for a small fine-tuning run: functions of this interpreter's standard library, and the docstrings their authors wrote.

    python examples/stdlib_docstrings.py [OUT_DIR] [--held-out N] [--max-chars N]

writes OUT_DIR/train.jsonl and OUT_DIR/held_out.jsonl. A row is a conversation: the user shows a function without its docstring, the
assistant answers with the docstring's first paragraph. The split is by top-level module or package, so that no package is on both sides;
a function body occurs once in all, and no answer of a held-out row is also one of a training row. Files are read with `ast`: nothing is
imported or run. One interpreter always gives the same rows in the same order, which is a shuffled one.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finebits.files import write_text

ASK = "Write a docstring for this Python function:\n\n"
DEFAULT = "runs/quickstart/data"
SHORTEST = 20
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Pair:
    """A function without its docstring, and the docstring's first paragraph. Functions of equal `body` do the same."""

    package: str
    origin: str
    source: str
    docstring: str
    body: str

    def row(self) -> dict[str, object]:
        turns = [{"role": "user", "content": ASK + self.source}, {"role": "assistant", "content": self.docstring}]
        return {"messages": turns, "package": self.package, "origin": self.origin}


def files(root: Path) -> Iterator[Path]:
    """The Python files under `root` except tests, in the order of their names."""
    for folder, names, here in os.walk(root):
        names[:] = sorted(name for name in names if name not in LEFT_OUT)
        yield from (Path(folder, name) for name in sorted(here) if name.endswith(".py"))


def pairs(path: Path, root: Path, max_chars: int, skipped: Counter[str]) -> Iterator[Pair]:
    """What one file holds. `skipped` counts what is left out, by the reason."""
    try:
        with tokenize.open(path) as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = f.read()
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        skipped["files that are not Python of this version"] += 1
        return
    lines = text.split("\n")
    package = path.relative_to(root).parts[0].removesuffix(".py")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        docstring = first_paragraph(docstring)
        source = undocumented(node, lines, max_chars - len(docstring))
        if len(docstring) < SHORTEST:
            skipped[f"docstrings of fewer than {SHORTEST} characters"] += 1
        elif len(node.body) == 1:
            skipped["functions that are nothing but a docstring"] += 1
        elif source is None:
            skipped[f"signatures and docstrings of more than {max_chars} characters"] += 1
        else:
            body = ast.dump(ast.Module(node.body[1:], []))
            yield Pair(package, f"{path.relative_to(root).as_posix()}:{node.lineno}", source, docstring, body)


def first_paragraph(docstring: str) -> str:
    """The text up to the first blank line, as it is written."""
    return re.split(r"\n\s*\n", docstring.strip())[0].rstrip()


def undocumented(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], max_chars: int) -> str | None:
    """The source of a function without its docstring, cut at the end of a line to `max_chars`; None if no line of the body fits."""
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    doc = node.body[0]
    assert doc.end_lineno is not None
    if len(node.body) == 1 or node.body[1].lineno == doc.end_lineno or doc.lineno == node.lineno:
        return None
    head, rest = lines[start : doc.lineno - 1], lines[doc.end_lineno : node.end_lineno]
    while rest and not rest[0].strip():
        del rest[0]
    kept = textwrap.dedent("\n".join([*head, *rest])).split("\n")
    length = 0
    for i, line in enumerate(kept):
        length += len(line) + 1
        if length > max_chars + 1:
            if i <= len(head):
                return None
            indent = len(kept[len(head)]) - len(kept[len(head)].lstrip())
            return "\n".join([*kept[:i], " " * indent + "..."])
    return "\n".join(kept)


def unique(found: Iterator[Pair], skipped: Counter[str]) -> Iterator[Pair]:
    """The first of the pairs that share a body, or that would show the same text."""
    seen: set[str] = set()
    for pair in found:
        if pair.body in seen or pair.source in seen:
            skipped["functions whose body came before"] += 1
        else:
            seen |= {pair.body, pair.source}
            yield pair


def split(found: Sequence[Pair], held_out: int, skipped: Counter[str]) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of different packages, at least `held_out` of the latter, each list shuffled.

    Packages are drawn by the hash of their name; those that alone would be a quarter of what is held out come last.
    """
    sizes = Counter(pair.package for pair in found)
    names = sorted(sizes, key=lambda name: (4 * sizes[name] > held_out, hashlib.sha256(name.encode()).digest()))
    for count in range(1, len(names)):
        out = set(names[:count])
        if sum(sizes[name] for name in out) < held_out:
            continue
        train = [pair for pair in found if pair.package not in out]
        answers = {pair.docstring for pair in train}
        kept = [pair for pair in found if pair.package in out and pair.docstring not in answers]
        if len(kept) >= held_out:
            skipped["held-out rows whose answer is also in train"] += sum(sizes[name] for name in out) - len(kept)
            random.Random(0).shuffle(train)
            random.Random(0).shuffle(kept)
            return train, kept
    raise SystemExit(f"--held-out {held_out} leaves nothing to train on: there are {len(found)} pairs in {len(sizes)} packages")


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", metavar="OUT_DIR", type=Path, nargs="?", default=Path(DEFAULT), help="default: %(default)s")
    parser.add_argument("--held-out", metavar="N", type=int, default=200, help="at least so many held-out rows (default: %(default)s)")
    parser.add_argument(
        "--max-chars",
        metavar="N",
        type=int,
        default=520,
        help="cut the source where it and the docstring pass so many characters (default: %(default)s)",
    )
    asked = parser.parse_args(args)
    if asked.held_out < 1 or asked.max_chars < SHORTEST:
        parser.error(f"--held-out must be at least 1 and --max-chars at least {SHORTEST}")

    root = Path(sysconfig.get_path("stdlib"))
    print(f"reading {root}", flush=True)
    skipped: Counter[str] = Counter()
    found = list[Pair]()
    for pair in unique((pair for path in files(root) for pair in pairs(path, root, asked.max_chars, skipped)), skipped):
        found.append(pair)
        if len(found) % 1000 == 0:
            print(f"{len(found):,} functions so far", flush=True)
    train, held_out = split(found, asked.held_out, skipped)
    for name, rows in (("train", train), ("held_out", held_out)):
        write_text(asked.out / f"{name}.jsonl", "".join(json.dumps(pair.row()) + "\n" for pair in rows))
        print(f"{asked.out / name}.jsonl: {len(rows):,} rows from {len({pair.package for pair in rows})} packages")
    print(f"Python {sys.version.split()[0]}, {root}; left out:")
    for reason, count in skipped.most_common():
        print(f"  {count:,} {reason}")


if __name__ == "__main__":
    main()
