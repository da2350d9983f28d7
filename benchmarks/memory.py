"""Predicted against measured training peaks on the CPU: the quickstart's model and rows, three budgets, two lengths, two ranks.

    python examples/stdlib_docstrings.py runs/quickstart/data
    python benchmarks/memory.py runs/memory            one piece after the other; what is done is kept, so it may be stopped
    python benchmarks/memory.py runs/memory --one      the next piece alone
    python benchmarks/memory.py runs/memory --blind    those alone that no constant of the memory model was fitted on
    python benchmarks/memory.py runs/memory --table    the table of what is done

Every piece plans into a budget that leaves its weights a share of the way from the smallest to the largest choice (a quarter, half or three
quarters where nothing else is said), and trains STEPS steps in a process of its own under the settings of finebits.meter. A length and a rank
are probed once, at the first of SHARES, and that calibration serves all their pieces. A peak is that of training above the process before the
model is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

LENGTHS, RANKS, SHARES, STEPS = (128, 256), (8, 32), (0.25, 0.5, 0.75), 6
FITTED = [(length, rank, share) for length in LENGTHS for rank in RANKS for share in SHARES]  # the constants of 0003 come from these
BLIND = [(320, 16, 0.35), (224, 128, 0.8), (384, 4, 0.4), (192, 4, 0.1), (384, 64, 0.9), (192, 64, 0.6)]  # which have none of theirs
HERE = Path(__file__).parent.parent


def recipe(folder: Path, length: int, rank: int, budget: str | None = None) -> Any:
    """The quickstart's recipe at this length and rank; a start at zero holds what every other start holds."""
    from finebits.recipe import Recipe

    changes = [f"data.max_length={length}", f"adapter.rank={rank}", f"adapter.alpha={rank}", "adapter.init=zeros", f"output_dir={folder}"]
    changes += [f"training.max_steps={STEPS}", "quantization.objective=weight", "evaluation.limit=8", "evaluation.compare=[]"]
    return Recipe.load(HERE / "recipes" / "quickstart.yaml", [*changes, f"budget.memory={budget or 'null'}", "budget.reserve='0'"])


def menu(folder: Path, length: int, rank: int) -> Any:
    """The plan without a budget, made once a length and rank: all its menus are in it."""
    from finebits import job
    from finebits.plan.base import Plan

    path = folder / f"menu-{length}-{rank}.json"
    if not path.exists():
        job.plan(recipe(folder / "none", length, rank), path)
    return Plan.load(path)


def planned(folder: Path, length: int, rank: int, share: float) -> Path:
    """The folder of a piece, with its recipe and its plan."""
    from finebits.files import write_text
    from finebits.plan.footprint import Footprint
    from finebits.plan.knapsack import smallest
    from finebits.plan.problem import menu_of
    from finebits.plan.solve import again
    from finebits.recipe.rows import rows_of
    from finebits.run.material import stored
    from finebits.runfolder import PLAN, RECIPE, RunFolder

    here = folder / f"{length}-{rank}-{share}"
    here.mkdir(parents=True, exist_ok=True)
    if not (here / PLAN).exists():
        whole = menu(folder, length, rank)
        options = menu_of(whole)
        least, most = smallest(options), sum(max(o.bytes for o in v) for v in options.values())
        budget = round((Footprint.of(whole).rest(whole.levers) + least + share * (most - least)) / 2**20)
        said = recipe(here, length, rank, f"{budget}MiB")
        write_text(here / RECIPE, said.to_yaml())
        again(whole, budget=budget * 2**20).save(here / PLAN)
        stored(said, rows_of(said), RunFolder(here))
    return here


def calibration(folder: Path, length: int, rank: int) -> int:
    """What a probe finds that a process of this length and rank holds beside tensors."""
    from finebits.run.stage import Stage, work
    from finebits.runfolder import PROBE, RunFolder

    calibrated = folder / f"probe-{length}-{rank}.json"
    if not calibrated.exists():
        here = planned(folder, length, rank, SHARES[0])
        work(RunFolder(here), Stage("probe", "probe", measured=True))
        calibrated.write_text((here / PROBE).read_text())
    return json.loads(calibrated.read_text())["runtime"]


def piece(folder: Path, length: int, rank: int, share: float) -> dict[str, Any]:
    """One row of the table."""
    from finebits.meter import MALLOC
    from finebits.plan.base import Plan
    from finebits.plan.footprint import Footprint
    from finebits.runfolder import PLAN

    here = planned(folder, length, rank, share)
    plan, runtime, begun = Plan.load(here / PLAN), calibration(folder, length, rank), time.time()
    if not (here / "measured.json").exists():
        subprocess.run([sys.executable, __file__, str(here), "--train"], env=os.environ | MALLOC, check=True)
    measured = json.loads((here / "measured.json").read_text())
    after = plan.memory["linear weights"] + Footprint.of(replace(plan, counted=replace(plan.counted, runtime=runtime))).rest(plan.levers)
    weights = sum(c["shape"][0] * c["shape"][1] for c in plan.costs.values())
    row = {"length": length, "rank": rank, "bits": 8 * plan.memory["linear weights"] / weights, "planned": plan.peak}
    return row | {"probed": after, "measured": measured["train"], "runtime": runtime, "seconds": round(time.time() - begun)}


def train(folder: Path) -> None:
    """In a process of its own: the run as `finebits train` makes it, without scores."""
    from finebits.run.part import Part
    from finebits.run.stage import Stage
    from finebits.run.tune import fit
    from finebits.runfolder import RunFolder

    part = Part(RunFolder(folder), Stage("tune", "zeros", measured=True))
    fit(part, part.plan)
    (folder / "measured.json").write_text(json.dumps(part.meter.peaks))


def table(rows: list[dict[str, Any]]) -> str:
    heads = ("tokens a row", "rank", "bits", "planned MiB", "measured MiB", "ratio", "planned after the probe MiB", "ratio")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    m = lambda v: f"{v / 2**20:.1f}"  # noqa: E731
    for r in rows:
        shown = [r["length"], r["rank"], f"{r['bits']:.2f}", m(r["planned"]), m(r["measured"])]
        shown += [f"{r['measured'] / r['planned']:.3f}", m(r["probed"]), f"{r['measured'] / r['probed']:.3f}"]
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    return "\n".join(lines)


def main(folder: str, *words: str) -> None:
    if "--train" in words:
        return train(Path(folder))
    root = Path(folder).resolve()
    root.mkdir(parents=True, exist_ok=True)
    results = root / "results.json"
    done = json.loads(results.read_text()) if results.exists() else {}
    wanted = {f"{length}-{rank}-{share}": (length, rank, share) for length, rank, share in ([] if "--blind" in words else FITTED) + BLIND}
    for key, what in wanted.items():
        if key not in done and "--table" not in words:
            done[key] = piece(root, *what)
            results.write_text(json.dumps(done, indent=1))
            print(key, done[key], flush=True)
            if "--one" in words:
                return
    print(table([done[key] for key in wanted if key in done]))


if __name__ == "__main__":
    main(*sys.argv[1:])
