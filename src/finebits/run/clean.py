"""What run folders hold that finebits wrote and nobody needs any more: checkpoints of finished runs, and whole runs that were set aside."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finebits import artefacts, files
from finebits.report import summary
from finebits.runfolder import CHECKPOINTS, FINISHED, MARKS, MODEL, OF_RUN, PLAN, PLANS, RUNS, STARTED, TARGETS, WHOLE, RunFolder

CHECKPOINT, ASIDE = "checkpoint of a finished run", "run that was set aside"


@dataclass(frozen=True)
class Leftover:
    """A folder of which `files` are to go, in a run folder, and the bytes that this frees: what another folder shares stays on the disk."""

    run: Path
    path: Path
    kind: str
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Of the files that have no other name."""
        stats = [f.lstat() for f in self.files]
        return sum(s.st_size for s in stats if s.st_nlink == 1)


def leftovers(folders: Sequence[Path], aside: bool = False) -> Iterator[Leftover]:
    """All of these folders and those below; with `aside`, runs that were set aside as well (NAME.1, …). Only of finished runs that nobody
    holds."""
    for path in summary.found(folders):
        folder = RunFolder(path)
        if folder.status != FINISHED or files.held(path):
            continue
        if aside and re.fullmatch(r".+\.[0-9]+", path.name):
            yield Leftover(path, path, ASIDE, tuple(_whole(folder)))
            continue
        for run in folder.made():
            for checkpoint in sorted((run / CHECKPOINTS).glob("checkpoint-*/")):
                if names := artefacts.owned(checkpoint):
                    yield Leftover(path, checkpoint, CHECKPOINT, _there(checkpoint, names))


def _whole(folder: RunFolder) -> Iterator[Path]:
    """The files of a run folder that finebits wrote."""
    for run in folder.made():
        yield from _there(run, OF_RUN)
        for artefact in (run / STARTED, run / MODEL, *(run / CHECKPOINTS).glob("checkpoint-*/")):
            yield from _there(artefact, artefacts.owned(artefact))
    for target in (folder / TARGETS).glob("*/"):
        yield from _there(target, artefacts.owned(target))
    yield from (p for p in (folder / PLANS).glob("*.json") if MARKS[PLAN].encode() in p.read_bytes()[:64])
    yield from _there(folder.path, WHOLE)


def _there(folder: Path, names: Sequence[str] | set[str]) -> tuple[Path, ...]:
    return tuple(folder / name for name in sorted(names) if (folder / name).is_file())


def remove(leftover: Leftover) -> int:
    """Take its files away, and the folders that are empty then; the bytes that were freed. Raises Occupied where somebody holds the run."""
    freed, folder = leftover.bytes, RunFolder(leftover.run)
    with folder.locked():
        if leftover.kind == CHECKPOINT:
            artefacts.remove(leftover.path)
            _empty(leftover.path.parent)
        else:
            for plan in (p for p in leftover.files if p.parent == folder / PLANS):
                plan.unlink()
            folder.clear()
            for place in (folder / PLANS, folder / RUNS, folder.path):
                _empty(place)
    return freed


def _empty(folder: Path) -> None:
    """Take a folder away if nothing is in it."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
