"""What run.json says beside settings and parts: what a run is made of, on what, and who worked at it from when to when."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finebits import files
from finebits.messages import explain
from finebits.plan.base import Plan
from finebits.process import INTERRUPTED
from finebits.recipe import Recipe
from finebits.report import summary
from finebits.report.pace import Pace
from finebits.run.machine import machine, version, versions
from finebits.run.source import Source, Subject
from finebits.runfolder import EVENTS, FAILED, FINISHED, RUNNING, RunFolder, digest
from finebits.runfolder import INTERRUPTED as STOPPED

PACKAGE = "package:"  # how the name of a model in an installed package begins


def about(recipe: Recipe, model: Subject, rows: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """What a run is made of and on, as far as results may depend on it; `rows` is what `data` says."""
    return {
        "model": _model(recipe, model, plan),
        "data": rows,
        "plan": plan.hash,
        "seed": recipe.training.seed,
        "versions": versions(),
        "machine": machine(plan.levers.device),
    }


def data(source: Source) -> dict[str, Any]:
    """How many rows there are, how many of those trained on are `repeated` and how many held-out ones are `known` from training, a fingerprint
    of them and of how the model sees them, and the files that they are from."""
    train, held = source.rows
    said = Counter(digest(row.said) for row in train)
    counts = {"repeated": len(train) - len(said), "known": sum(digest(row.said) in said for row in held)}
    return {"fingerprint": source.hash, "rows": len(train), "held_out": len(held), **counts, "files": _files(source.recipe)}


def _model(recipe: Recipe, model: Subject, plan: Plan) -> dict[str, Any]:
    """The model by name, the revision that was loaded (a hub's commit, or a package's version), and the fingerprint of its weights."""
    name, revision, folder = recipe.model.model_name_or_path, recipe.model.model_revision, model.folder
    if folder.parent.name == "snapshots":  # of the hub's cache, where a folder is called as its commit
        revision = folder.name
    elif name.startswith(PACKAGE):
        revision = version(name.removeprefix(PACKAGE).partition(":")[0])
    return {"name": name, "revision": revision, "fingerprint": plan.model_hash}


def _files(recipe: Recipe) -> list[dict[str, Any]]:
    """Every file of rows that a recipe names, with its size and sha256; what is no file or folder of this machine goes by its name alone."""
    named = [(d.path, "train") for d in recipe.data.datasets] + ([(recipe.data.held_out.path, "held out")] if recipe.data.held_out else [])
    found = []
    for name, use in named:
        path = Path(name)
        inside = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        found += [{"path": str(p), "use": use, "bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in inside]
        found += [] if inside else [{"path": name, "use": use}]
    return found


def command() -> str:
    """The command line of this process, as it would be typed."""
    first, *words = sys.argv or [""]
    program = Path(first)
    own = program.name == "finebits" or program.parts[-2:] == ("finebits", "__main__.py")
    return shlex.join([*(["finebits"] if own else ["python", first]), *words])


@contextlib.contextmanager
def working(folder: RunFolder, begun: float, run: str | None = None) -> Iterator[None]:
    """Note in the record who works at a run and how that ends. `begun` is the time at which it did; `run` names the one that is trained, whose
    events then tell the pace; None where a finished run is added to, and stays finished."""
    before = folder.record().get("sessions", [])
    session: dict[str, Any] = {"command": command(), "begun": begun, "ended": None, "seconds": None, "exit": None}
    status = {"status": RUNNING} if run is not None else {}
    folder.note(sessions=[*before, session], **status)

    def end(state: str, code: int, said: str = "") -> None:
        ended = time.time()
        session.update({"ended": ended, "seconds": round(ended - begun, 1), "exit": code} | ({"said": said} if said else {}))
        status = {}
        if run is not None:
            events = folder.run(run) / EVENTS
            status = {"status": state, "pace": Pace.of(summary.events(events)[0] if events.exists() else ()).to_json()}
        folder.note(sessions=[*before, session], **status)

    try:
        yield
    except BaseException as e:
        message = explain(e)
        with contextlib.suppress(OSError, ValueError):  # of a full disk; what went wrong first is what is to be told
            end(STOPPED if message.code == INTERRUPTED else FAILED, message.code, message.text)
        raise
    end(FINISHED, 0)
