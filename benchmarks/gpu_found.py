"""What a part of `benchmarks/gpu.py` finds, written as it comes."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Out:
    """A part's findings, in a file that is whole after every `add`."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[str, Any]()

    def set(self, **values: Any) -> None:
        self.found |= values
        self._write()

    def add(self, key: str, row: Any) -> None:
        self.found.setdefault(key, []).append(row)
        self._write()
        print(json.dumps(row), flush=True)

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1))
        new.replace(self.path)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def caught(out: Out, what: str) -> Iterator[None]:
    """An error becomes a row, and the part goes on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        out.add("errors", {"in": what, "error": f"{type(error).__name__}: {str(error)[:600]}", "trace": traceback.format_exc()[-3000:]})
    finally:
        gc.collect()
