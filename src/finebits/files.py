"""Files and folders that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as f:
            f.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `path` only when the block ends well. An interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.chmod(new, 0o755)
    try:
        yield new
        if path.exists():
            _exchange(new, path)
            shutil.rmtree(new)
        else:
            os.replace(new, path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders; in one step where the kernel can, so that there is no moment without a `b`."""
    if sys.platform == "linux":
        swap = getattr(ctypes.CDLL(None), "renameat2", None)
        here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if swap is not None and swap(here, os.fsencode(a), here, os.fsencode(b), both) == 0:
            return
    aside = Path(tempfile.mkdtemp(dir=b.parent, prefix=f".{b.name}.old."))
    os.replace(b, aside / "old")
    try:
        os.replace(a, b)
    except BaseException:
        os.replace(aside / "old", b)
        aside.rmdir()
        raise
    os.replace(aside / "old", a)
    aside.rmdir()
