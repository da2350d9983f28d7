"""Sweeps: cells, what they share, and what a failed or finished one is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finebits import job
from finebits.cli import main
from finebits.errors import Invalid
from finebits.run import grid
from finebits.run.stage import Stage, StageFailed
from finebits.runfolder import RunFolder
from test_runfolder import House

KEYS = ("training.weight_decay=0,0.1", "training.warmup_steps=0,2")


class Field(House):
    """A house where scores depend on weight_decay, and plans are counted."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root, monkeypatch)
        self.planned = 0
        self.file = root / "r.yaml"
        from test_runfolder import RECIPE

        self.file.write_text(RECIPE.format(root=root))

    def priced(self, recipe: Any, *rest: Any) -> Any:
        self.planned += 1
        return super().priced(recipe, *rest)

    def work(self, folder: RunFolder, stage: Stage) -> None:
        where = f"{folder.path.name}: {stage.part}"
        if where == self.fails:
            raise StageFailed("zeros was killed", 5)
        super().work(folder, stage)
        self.done[-1] = where
        run, worse = folder.run(stage.run), json.loads((folder / "run.json").read_text())["settings"]["training"]["weight_decay"]
        rows = np.arange(1.0, 31.0)
        made = {k: rows * (2.0 + worse) for k in ("nll", "kl", "agree")} | {"tokens": rows}
        np.savez(run / ("start.npz" if stage.kind == "start" else "scores.npz"), **made)

    def sweep(self, *words: str, **how: Any) -> dict[str, Any]:
        cells, rest = grid.cells(words)
        return job.sweep(self.recipe(*rest), cells, lambda more: self.recipe(*rest, *more), **how)


@pytest.fixture
def field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Field:
    return Field(tmp_path, monkeypatch)


def test_cells_share_plan_and_start_where_only_training_differs(field: Field) -> None:
    made = field.sweep(*KEYS)
    assert field.planned == 1
    tuned = [f"weight_decay={d},warmup_steps={w}: {part}" for d in ("0", "0.1") for w in ("0", "2") for part in ("zeros", "export")]
    first = "weight_decay=0,warmup_steps=0: "
    assert field.done == [first + "full", first + "zeros/start", *tuned]
    assert made["best"] == "weight_decay=0,warmup_steps=0" and [r["status"] for r in made["cells"]] == ["finished"] * 4
    assert [r["after"]["loss"] for r in made["cells"]] == pytest.approx([2.0, 2.0, 2.1, 2.1])
    assert made["cells"][3]["paired"] == pytest.approx([0.1, 0.1, 0.1]) and "paired" not in made["cells"][0]
    assert json.loads((field.root / "run" / "sweep" / "sweep.json").read_text()) == json.loads(json.dumps(made))


def test_what_planning_asks_for_is_planned_anew(field: Field) -> None:
    made = field.sweep("adapter.rank=2,3")
    assert field.planned == 2 and [r["status"] for r in made["cells"]] == ["finished"] * 2


def test_it_goes_on_where_it_was(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    field.sweep(*KEYS, limit=1)
    field.done.clear()
    real = field.work

    def stopped(folder: RunFolder, stage: Stage) -> None:
        if folder.path.name == "weight_decay=0.1,warmup_steps=0":
            raise KeyboardInterrupt
        real(folder, stage)

    monkeypatch.setattr(job, "work", stopped)
    with pytest.raises(KeyboardInterrupt):
        field.sweep(*KEYS)
    assert {w.partition(":")[0] for w in field.done} == {"weight_decay=0,warmup_steps=2"}, "the finished cell is kept"
    monkeypatch.setattr(job, "work", real)
    made = field.sweep(*KEYS)
    assert [r["status"] for r in made["cells"]] == ["finished"] * 4 and field.planned == 1
    field.done.clear()
    field.sweep(*KEYS)
    assert field.done == []
    assert not list((field.root / "run" / "sweep").glob("*.1")), "no cell was set aside"
    field.sweep(*KEYS, overwrite=True)
    assert len(field.done) > 4


def test_a_failed_cell_is_a_row(field: Field) -> None:
    field.fails = "weight_decay=0,warmup_steps=0: zeros"
    made = field.sweep(*KEYS)
    assert [r["status"] for r in made["cells"]] == ["failed", "finished", "finished", "finished"]
    assert made["cells"][0]["said"] == "zeros was killed" and made["best"] == "weight_decay=0,warmup_steps=2"
    field.fails, field.done = "", []
    assert field.sweep(*KEYS)["cells"][0]["status"] == "finished" and len(field.done) == 2, "it alone is tried again"


def test_cells_of_another_recipe_do_not_count(field: Field) -> None:
    field.sweep("training.weight_decay=0,0.1")
    made = field.sweep("training.weight_decay=0,0.1", "training.max_steps=5", limit=1)
    assert [r["status"] for r in made["cells"]] == ["finished", "not run"]
    assert (field.root / "run" / "sweep" / "weight_decay=0.1" / "run.json").exists(), "what is there stays"


def test_other_rows_are_not_compared(field: Field) -> None:
    made = field.sweep("evaluation.limit=1,2")
    assert [r.get("paired") for r in made["cells"]] == [None, None]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["training.seed"], "written section.key=VALUE,VALUE"),
        (["training.seed=1"], "needs a key with several values"),
        (["training.seed=1,1"], "empty or comes twice"),
        (["training.seed=1,"], "empty or comes twice"),
        (["training.seed=1,2", "training.seed=3,4"], "comes twice"),
    ],
)
def test_grids_that_are_none(words: list[str], said: str) -> None:
    with pytest.raises(Invalid, match=said):
        grid.cells(words)


def test_names_of_cells_are_names_of_folders() -> None:
    cells, _ = grid.cells(["adapter.init={paper: loftq, steps: 5},a/../b", "x.rank=1,2", "adapter.rank=3,4"])
    names = [c.name for c in cells]
    assert len(set(names)) == 8 and all("/" not in n and " " not in n for n in names) and "x.rank=1,adapter.rank=3" in names[0]


def test_the_command(field: Field, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["finebits", "sweep"])
    assert main(["sweep", str(field.file), *KEYS, "--dry-run"]) == 0 and "not run" in capsys.readouterr().out
    assert field.done == []
    capsys.readouterr()
    assert main(["sweep", str(field.file), "training.learning_rate=-1,1e-4"]) == 2 and "learning_rate" in capsys.readouterr().err
    field.fails = "weight_decay=0.1,warmup_steps=2: zeros"
    assert main(["sweep", str(field.file), *KEYS]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert (
        shown[0].split()[:3] == ["weight_decay", "warmup_steps", "held-out"]
        and "best" in shown[1]
        and "+0.1000 [+0.1000, +0.1000]" in "".join(shown)
    )
    assert shown[-1] == " weight_decay=0.1,warmup_steps=2: zeros was killed"
