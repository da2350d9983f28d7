"""A disk that fills, and two processes in one folder: whatever writes an artefact says so in a sentence and leaves what was there.

Of a whole job: test_killed.py and tests/test_runfolder.py.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finebits as fb
import tiny_llama as tiny
from finebits import artefacts, files
from finebits.interop.peft import export

WRITERS = ("save", "adapter", "merged", "packed", "gguf", "gguf:q8_0", "merge")
REASONS = "files may not be so large there|the disk is full, or takes no file so large"  # some libraries do not tell which
ROOM = 4 << 10  # bytes of a file: less than any of these weights take


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Path], Any]]:
    """What writes a folder, by name."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("models")
    tiny.worded(root / "base")
    peft = get_peft_model(tiny.fresh(), LoraConfig(r=2, target_modules=["up_proj"]))  # type: ignore[arg-type]
    peft.save_pretrained(root / "lora")
    model = tiny.tuned(tiny.plan(format=fb.Int(4, block=32, scale="fp16")))
    made: dict[str, Callable[[Path], Any]] = {
        target: lambda place, target=target: export(model, place, target, base_name="tiny/llama") for target in WRITERS[1:-1]
    }
    return made | {"save": lambda place: fb.save(model, place), "merge": lambda place: fb.merge(root / "lora", root / "base", place)}


def held(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills(name: str, writers: dict[str, Callable[[Path], Any]], tmp_path: Path) -> None:
    write, old = writers[name], tmp_path / "old"
    write(old)
    before, limits = held(old), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert artefacts.intact(old)
    for place in (old, tmp_path / "new"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, limits[1]))
        try:
            with pytest.raises(files.CannotWrite, match=f"{place.name}.* cannot be written: ({REASONS})"):
                write(place)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert held(old) == before and not (tmp_path / "new").exists()
    write(old)
    assert artefacts.intact(old)


@pytest.mark.parametrize("name", WRITERS)
def test_two_processes_in_one_folder(name: str, writers: dict[str, Callable[[Path], Any]], tmp_path: Path) -> None:
    writers[name](tmp_path / "place")
    before = held(tmp_path / "place")
    with files.locked(tmp_path / "place"), pytest.raises(files.Occupied, match="is being saved to by another process: wait for it"):
        writers[name](tmp_path / "place")
    assert held(tmp_path / "place") == before
