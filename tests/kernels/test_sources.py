"""The C of the CPU kernels as files: none includes itself in the end, each says what it is, all are compiled."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NATIVE = ROOT / "src" / "finebits" / "kernels" / "native"
FILES = {str(path.relative_to(NATIVE)): path.read_text(encoding="utf-8") for path in NATIVE.rglob("*.[ch]")}


def test_no_file_includes_itself() -> None:
    includes = {name: re.findall(r'^#include "(.+)"', text, re.M) for name, text in FILES.items()}

    def above(name: str, way: tuple[str, ...] = ()) -> None:
        assert name not in way, " -> ".join((*way, name))
        for other in includes[name]:
            above(other, (*way, name))

    for name in includes:
        above(name)


def test_every_file_says_what_it_is() -> None:
    assert not [name for name, text in FILES.items() if not text.startswith("/* ")]


def test_every_file_is_compiled_once_for_each_set() -> None:
    patterns = re.findall(r'^    "(\S+\.c)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), re.M)
    compiled = [str(path.relative_to(NATIVE)) for pattern in patterns for path in NATIVE.glob(pattern)]
    assert sorted(compiled) == sorted(name for name in FILES if name.endswith(".c"))
