"""What is left of a job that is killed: `kill -9` at random points of planning, starting, training, saving, exporting and merging.

    python benchmarks/killed.py                50 points, each of them a job of its own
    python benchmarks/killed.py --points 5     fewer

A tiny model is trained for a few steps with a checkpoint at every second one, exported as an adapter and merged, and the adapter is merged by
itself as well. A job is forked from this process, so that no time goes into imports, and killed as it is about to touch a file of its folder for
the n-th time, n being drawn of all the times that an undisturbed job does, or up to a twentieth of a second after that: in the middle of a file
or of a step. Then three things must hold. What is recorded as whole is whole (sha256 of every file). The same command, with --resume where a run
had begun, goes on from the last checkpoint and completes. And its losses, its weights and its exports are those of the undisturbed job, bit for
bit: nothing is lost but time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finebits import artefacts, files
from finebits.recipe import Recipe
from finebits.run.stage import Stage
from finebits.runfolder import CHECKPOINTS, EVENTS, MODEL, RECORD, RUNS, STARTED, TARGETS, RunFolder

TOUCHES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link")  # and "open", to write
LATER = 0.05  # seconds
RUN = "zeros"
MERGED = "of_folders"  # what `finebits adapters merge` makes of the exported adapter
SETTINGS = {
    "model": {"dtype": "float32"},
    "budget": {"memory": "700MiB"},
    "data": {"max_length": 64},
    "adapter": {"rank": 4, "init": RUN},
    "quantization": {"candidates": ["nf4-b32-bf16"], "objective": "weight"},
    "evaluation": {"samples": 0},
    "training": {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2, "save_total_limit": 2},
    "export": {"to": ["adapter", "merged"], "verify": False},
}


def recipe(root: Path, name: str) -> Recipe:
    """The job `name` over the model root/m and the rows root/d.jsonl, in the folder root/name."""
    paths = {"model.model_name_or_path": "m", "data.datasets.0.path": "d.jsonl", "data.held_out.path": "d.jsonl", "output_dir": name}
    return Recipe.parse(json.dumps(SETTINGS), "killed.py", [f"{key}={json.dumps(str(root / value))}" for key, value in paths.items()])


def job(root: Path, name: str) -> None:
    """The whole job in this process, its stages too; gone on with where it has begun."""
    from finebits import job
    from finebits.interop.merging import merge_several
    from finebits.run.__main__ import make

    def here(folder: RunFolder, stage: Stage) -> None:
        make(folder, stage)

    job.work = here
    wanted = recipe(root, name)
    folder = RunFolder(wanted.output_dir)
    job.train(wanted, resume=folder.holds())
    merge_several([folder.target("adapter")], None, folder / MERGED, overwrite=True)


def forked(work: Callable[[], None], log: Path) -> int:
    """Do it in a fork of this process, whose words go to `log`; its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 1), os.dup2(words, 2)
        work()
        sys.stdout.flush()
        code = 0
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode())  # whatever sys.stderr is here
    finally:
        os._exit(code)


def imported(names: Path) -> None:
    """Import here what a fork has imported, so that those to come need not."""
    for name in names.read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def watched(folder: Path, touched: Callable[[int], None]) -> None:
    """Call `touched` with 1, 2, … whenever this process is about to write, move or remove something in a folder."""
    inside, count = str(folder), 0

    def heard(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and len(given) > 2 and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in TOUCHES) and any(str(g).startswith(inside) for g in given[:2] if isinstance(g, str | os.PathLike)):
            count += 1
            touched(count)

    sys.addaudithook(heard)


def die(after: float) -> None:
    """Be killed: at once, or a little later."""
    if not after:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()


def broken(folder: Path) -> list[str]:
    """What is recorded as whole, and is not."""
    run = folder / RUNS / RUN
    places = [run / STARTED, run / MODEL, folder / MERGED, *run.glob(f"{CHECKPOINTS}/checkpoint-*/"), *folder.glob(f"{TARGETS}/*/")]
    found = [str(p) for p in places if (p / artefacts.RECORD).exists() and not artefacts.intact(p)]
    record = RunFolder(folder).record() if (folder / RECORD).exists() else {}
    stale = [part for part, entry in record.get("parts", {}).items() if not RunFolder(folder).has(part, entry["made_by"])]
    return [*found, *stale]


def steps(folder: Path) -> list[tuple[int, float]]:
    """The losses that the run's events hold."""
    file = folder / RUNS / RUN / EVENTS
    lines = file.read_text().splitlines() if file.exists() else []
    seen = [json.loads(line) for line in lines if line.endswith("}")]
    return [(e["step"], e["loss"]) for e in seen if e["event"] == "step" and "loss" in e]


def made(folder: Path) -> dict[str, str]:
    """{weights of the trained model and of its exports: their sha256}."""
    weights = [p for place in (folder / RUNS / RUN / MODEL, folder / TARGETS, folder / MERGED) for p in place.rglob("*.safetensors")]
    return {p.relative_to(folder).as_posix(): files.sha256(p) for p in weights}


def trials(root: Path, points: int, seed: int = 0, say: Callable[[str], None] = print) -> list[str]:
    """Kill so many jobs; what went wrong."""
    touches, log = root / "touches", root / "log"

    def undisturbed() -> None:
        watched(root / "whole", lambda n: touches.write_text(str(n)) and None)
        job(root, "whole")
        (root / "modules").write_text("\n".join(sys.modules))

    if forked(undisturbed, log):
        return [f"the undisturbed job failed:\n{log.read_text()}"]
    imported(root / "modules")
    total, whole = int(touches.read_text()), made(root / "whole")
    right, wrong, draw = dict(steps(root / "whole")), list[str](), random.Random(seed)
    assert len(right) == 6 and len(whole) >= 3, (right, whole)
    for i in range(points):
        name, at, after = f"run{i}", draw.randint(1, total), draw.choice((0.0, draw.uniform(0, LATER)))
        folder, begun, words = root / name, time.monotonic(), root / f"log{i}"

        def killed(name: str = name, at: int = at, after: float = after, folder: Path = folder) -> None:
            watched(folder, lambda n: die(after) if n == at else None)
            job(root, name)

        code = forked(killed, words)
        told = [f"recorded as whole: {b}" for b in broken(folder)] if folder.exists() else []
        before = [step for step, _ in steps(folder)]
        again = forked(lambda name=name: job(root, name), words)
        if again:
            told.append(f"the second try ended with {again}:\n{words.read_text()[-2000:]}")
        elif made(folder) != whole or dict(steps(folder)) != right:
            told.append(f"came out otherwise: {sorted(k for k, v in whole.items() if made(folder).get(k) != v)} {steps(folder)}")
        wrong += [f"touch {at} of {total} + {1000 * after:.0f} ms: {t}" for t in told]
        seconds = time.monotonic() - begun
        where = f"{i + 1:3d}  touch {at:4d}/{total} + {1000 * after:2.0f} ms  ended {code:3d}"
        say(f"{where}  {len(before)} steps done  {told or 'ok'}  {seconds:.1f} s")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch

    import chatty

    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as place:
        chatty.recipe(Path(place))
        wrong = trials(Path(place), asked.points, asked.seed, lambda line: print(line, flush=True))
    print("\n".join(wrong) or f"{asked.points} of {asked.points} jobs that were killed ended as the undisturbed one")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
