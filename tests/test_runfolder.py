"""An output folder belongs to its recipe. The parts of the job are replaced by stand-ins that write what the real ones would."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from finebits import artefacts, files, job, runfolder
from finebits.files import Occupied
from finebits.plan.base import Plan
from finebits.plan.levers import Levers
from finebits.recipe import Recipe
from finebits.run import plans
from finebits.run.stage import Stage, StageFailed
from finebits.runfolder import RunFolder, digest

RECIPE = """
model: {{model_name_or_path: {root}/m}}
data: {{datasets: [{{path: {root}/d.jsonl}}], held_out: {{path: {root}/d.jsonl}}, max_length: 64}}
adapter: {{init: zeros}}
evaluation: {{samples: 0}}
training: {{max_steps: 2}}
export: {{to: [adapter]}}
output_dir: {root}/run
"""


class House:
    """A folder with a model, rows and a recipe; `done` lists the parts that were made."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.done, self.fails = root, [], ""
        for name in ("m", "other"):
            (root / name).mkdir()
            (root / name / "config.json").write_text(
                json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "name": name})
            )
        self.rows("one")
        monkeypatch.setattr(job, "work", self.work)
        monkeypatch.setattr(plans, "priced", self.priced)
        monkeypatch.setattr(job, "priced", self.priced)
        monkeypatch.setattr(
            job, "gated", lambda *given: (SimpleNamespace(to_json=lambda: {"preview": []}, packed=None, template_sha=None), Mock())
        )
        for tokens in ("stored", "tokenized"):
            monkeypatch.setattr(job, tokens, Mock())
        monkeypatch.setattr(job, "report", lambda folder: folder / "report.html")
        monkeypatch.setattr(job, "ahead", lambda *given: SimpleNamespace(lines=lambda speed: []))

    def rows(self, text: str) -> None:
        (self.root / "d.jsonl").write_text(json.dumps({"text": text}) + "\n")

    def recipe(self, *changes: str) -> Recipe:
        return Recipe.parse(RECIPE.format(root=self.root), "r.yaml", changes)

    def priced(self, recipe: Recipe, *rest: Any) -> Plan:
        from finebits.interop.hf import fingerprint

        name = recipe.model.model_name_or_path
        given = dict(levers=Levers(max_length=recipe.data.max_length), budget=recipe.budget.total, memory={"all": 100 << 20})
        return Plan({}, model=name, model_hash=fingerprint(Path(name)), **given)  # type: ignore[arg-type]

    def work(self, folder: RunFolder, stage: Stage) -> None:
        self.done.append(stage.part)
        if self.done[-1] == self.fails:
            raise KeyboardInterrupt
        run, value = folder.run(stage.run), Recipe.load(folder / "recipe.yaml").training.learning_rate
        run.mkdir(parents=True, exist_ok=True)
        (run / "events.jsonl").write_text("")
        scores = {k: np.array([value, 1.0]) for k in ("nll", "tokens", "kl", "agree")}
        np.savez(run / ("start.npz" if stage.kind == "start" else "scores.npz"), **scores)
        if stage.kind == "export":
            rows = [{"name": target, "path": str(folder / "export"), "verdict": "same"} for target in stage.to]
            files.write_text(folder / "export.json", json.dumps({"targets": rows}))
        elif stage.kind != "full":
            with artefacts.folder(run / ("start" if stage.kind == "start" else "model"), "saved") as new:
                files.write_text(new / "plan.json", str(value))
                artefacts.record(new, "saved")

    @property
    def told(self) -> set[str]:
        return {e["key"] for e in json.loads((self.root / "run" / "evaluation.json").read_text())["entries"]}

    def everything(self) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in (self.root / "run").rglob("*") if p.is_file()}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(tmp_path, monkeypatch)


ALL = ["full", "zeros/start", "zeros", "export"]


@pytest.mark.parametrize("changes", [[], ["training.learning_rate=0.1"], ["export.to=[]"]])
def test_a_finished_run_is_set_aside_for_the_next(house: House, changes: list[str]) -> None:
    """dssg/aequitas#166: a second run in a folder reports the first one's parts as its own. Nothing of the first is lost either."""
    first = {"evaluation.compare=[lora16]"}
    job.train(house.recipe(*first))
    before = {k.replace("/run/", "/run.1/"): v for k, v in house.everything().items()}
    (house.root / "run" / "notes.txt").write_text("mine")
    house.done.clear()
    job.train(house.recipe(*changes))
    assert house.done == (ALL if changes != ["export.to=[]"] else ALL[:-1]) and "lora16" not in house.told
    aside = house.root / "run.1"
    assert {str(p): p.read_bytes() for p in aside.rglob("*") if p.is_file()} == before
    assert (house.root / "run" / "notes.txt").read_text() == "mine" and not (aside / "notes.txt").exists()
    job.train(house.recipe())
    assert (house.root / "run.2" / "run.json").exists()


def test_an_export_that_is_set_aside_names_its_own_base(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    export = folder / "export" / "adapter"
    with artefacts.folder(export, "exported") as new:
        files.write_text(new / "adapter_config.json", json.dumps({"base_model_name_or_path": str(export / "base"), "r": 4}))
        artefacts.record(new, "exported")
    aside = folder.set_aside() / "export" / "adapter"
    assert json.loads((aside / "adapter_config.json").read_text()) == {"base_model_name_or_path": str(aside / "base"), "r": 4}
    assert artefacts.intact(aside)


def test_a_run_that_replaces_another_tells_of_itself_alone(house: House) -> None:
    mine = house.root / "run" / "runs" / "zeros" / "notes"
    job.train(house.recipe("evaluation.compare=[lora16]"))
    assert house.told == {"full", "zeros_start", "zeros", "lora16", "export"}
    mine.write_text("mine")
    job.train(house.recipe("training.learning_rate=0.1", "export.to=[]"), overwrite=True)
    assert house.told == {"full", "zeros_start", "zeros"} and mine.read_text() == "mine"
    assert not (house.root / "run" / "export.json").exists() and not (house.root / "run" / "runs" / "lora16").exists()


def test_a_replacement_that_never_begins_leaves_the_run(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job.train(house.recipe())
    before = house.everything()
    monkeypatch.setattr(job, "gated", Mock(side_effect=ValueError("the gate")))
    with pytest.raises(ValueError, match="the gate"):
        job.train(house.recipe("training.learning_rate=0.1"), overwrite=True)
    assert house.everything() == before


def test_a_finished_run_goes_on_to_more_steps(house: House) -> None:
    job.train(house.recipe())
    house.done.clear()
    job.train(house.recipe(), resume=True)
    assert house.done == [], "there is nothing to do"
    job.train(house.recipe("training.max_steps=4", "export.to=[]"), resume=True)
    assert house.done == ["zeros"] and house.told == {"full", "zeros_start", "zeros"}, "the export was of the shorter run"
    assert "max_steps: 4" in (house.root / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["training.learning_rate=0.1"], "training.learning_rate is 0.1 and was 0.0002"),
        (["training.max_steps=1"], "training.max_steps is 1 here where the run in .* has 2"),
        (["adapter.rank=3"], "adapter.rank is 3 and was None"),
    ],
)
def test_a_run_goes_on_as_it_began(house: House, changes: list[str], said: str) -> None:
    job.train(house.recipe())
    before = house.everything()
    with pytest.raises(Occupied, match=said):
        job.train(house.recipe(*changes), resume=True)
    assert house.everything() == before


def test_other_rows_under_the_same_name_are_seen(house: House) -> None:
    job.train(house.recipe())
    house.rows("two")
    with pytest.raises(Occupied, match="the rows or the tokenizer are others"):
        job.train(house.recipe(), resume=True)
    with pytest.raises(Occupied, match="the rows or the tokenizer are others"):
        job.evaluate(house.recipe())


def test_another_template_is_seen(house: House) -> None:
    job.train(house.recipe())
    (house.root / "m" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(Occupied, match="the rows or the tokenizer are others"):
        job.train(house.recipe(), resume=True)


def test_an_interrupted_run_goes_on_where_it_was(house: House) -> None:
    house.fails = "zeros"
    with pytest.raises(KeyboardInterrupt):
        job.train(house.recipe())
    house.fails = ""
    with pytest.raises(Occupied, match="holds an unfinished run of this recipe: .*--resume.*--overwrite"):
        job.train(house.recipe())
    for change in ("training.learning_rate=0.1", "training.max_steps=1"):
        with pytest.raises(Occupied, match="holds an unfinished run of another recipe") as refused:
            job.train(house.recipe(change))
        assert "--resume" not in str(refused.value), "which would not go on with it"
    house.done.clear()
    job.train(house.recipe(), resume=True)
    assert house.done == ["zeros", "export"] and house.told == {"full", "zeros_start", "zeros", "export"}


def test_a_part_that_was_changed_is_made_again(house: House) -> None:
    house.fails = "export"
    with pytest.raises(KeyboardInterrupt):
        job.train(house.recipe())
    house.fails = ""
    house.done.clear()
    (house.root / "run" / "runs" / "zeros" / "scores.npz").write_bytes(b"of another run")
    job.train(house.recipe(), resume=True)
    assert house.done == ["zeros", "export"]


def test_nothing_to_resume_is_said(house: House) -> None:
    with pytest.raises(Occupied, match="nothing to resume"):
        job.train(house.recipe(), resume=True)
    assert not (house.root / "run").exists(), "no empty folder is left of it"
    assert house.done == [] and not (house.root / "run" / "recipe.yaml").exists()
    with pytest.raises(Occupied, match="leave one of the two out"):
        job.train(house.recipe(), resume=True, overwrite=True)


def test_a_plan_lies_beside_a_finished_run(house: House) -> None:
    folder = RunFolder(house.root / "run")
    job.plan(house.recipe())
    job.train(house.recipe())
    before = house.everything()
    made = job.plan(house.recipe("budget.memory=262MiB"))
    added = {Path(p).relative_to(folder.path).as_posix() for p in house.everything().keys() - before.keys()}
    assert added == {f"plans/{made.hash}.json"} and folder.plan_path(made) == folder / f"plans/{made.hash}.json"
    assert {p: b for p, b in house.everything().items() if p in before} == before


def test_a_plan_of_something_else_is_refused(house: House) -> None:
    path = house.root / "p.json"
    house.priced(house.recipe(f"model.model_name_or_path={house.root}/other")).save(path)
    with pytest.raises(ValueError, match="p.json was made for .*/other .*and the recipe's model is .*/m") as e:
        job.train(house.recipe(), path)
    assert getattr(e.value, "code") == 3 and house.done == []
    house.priced(house.recipe("data.max_length=32")).save(path)
    with pytest.raises(ValueError, match="rows of 32 tokens"):
        job.train(house.recipe(), path)
    house.priced(house.recipe()).save(path)
    with pytest.raises(ValueError, match="needs 100 MiB and the recipe's budget leaves 47.5 MiB"):
        job.train(house.recipe("budget.memory=50MiB"), path)
    replace(Plan.load(path), rows={"start": 190 << 20}).save(path)
    with pytest.raises(ValueError, match="needs 190 MiB and the recipe's budget leaves 142.5 MiB"):  # of its largest phase
        job.train(house.recipe("budget.memory=150MiB"), path)
    job.train(house.recipe("budget.memory=200MiB"), path)
    assert Plan.load(house.root / "run" / "plan.json").hash == Plan.load(path).hash


def test_a_dry_run_leaves_room_for_the_run(house: House) -> None:
    job.train(house.recipe(), dry_run=True)
    assert house.done == []
    job.train(house.recipe())
    before = house.everything()
    job.train(house.recipe("training.learning_rate=0.1"), dry_run=True, overwrite=True)
    assert house.everything() == before


def test_an_export_is_added_to_a_finished_run(house: House) -> None:
    job.train(house.recipe())
    made = job.export(house.recipe(), ["merged"], False)
    assert [t["name"] for t in made["targets"]] == ["adapter", "merged"]
    with pytest.raises(Occupied, match="training.learning_rate"):
        job.export(house.recipe("training.learning_rate=0.1"), ["merged"])
    with pytest.raises(ValueError, match="holds no run yet"):
        job.export(house.recipe(f"output_dir={house.root}/empty"))


def test_two_runs_at_once(house: House) -> None:
    with RunFolder(house.root / "run").locked(), pytest.raises(Occupied, match="in use by another run"):
        job.train(house.recipe())
    job.train(house.recipe())


def test_a_run_from_before_there_were_records(house: House) -> None:
    job.train(house.recipe())
    (house.root / "run" / "run.json").unlink()
    with pytest.raises(Occupied, match="says nothing of its recipe.*--overwrite"):
        job.train(house.recipe())
    with pytest.raises(Occupied, match="cannot be resumed"):
        job.train(house.recipe(), resume=True)
    job.train(house.recipe(), overwrite=True)


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "plan.json", "data.json", "evaluation.json", "samples.json", "run.json", "tokens.safetensors", "report.html"]
)
def test_a_file_of_the_users_own_is_not_replaced(house: House, name: str) -> None:
    (house.root / "run").mkdir()
    (house.root / "run" / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(Occupied, match=f"{name} is a file that finebits did not write"):
            job.train(house.recipe(), overwrite=overwrite)
    assert house.done == [] and list(house.everything().values()) == [b"mine"]
    (house.root / "thesis.txt").write_text("mine")
    with pytest.raises(Occupied, match="thesis.txt is a file that finebits did not write"):
        job.plan(house.recipe("output_dir=elsewhere"), house.root / "thesis.txt")


def test_runs_of_other_recipes_below_are_left_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output_dir whose runs/ holds output folders of others."""
    below = house.root / "run" / "runs" / "quickstart"
    (below / "data").mkdir(parents=True)
    for name in ("samples.json", "data/train.jsonl"):
        (below / name).write_text("mine")
    job.train(house.recipe())
    job.train(house.recipe(), overwrite=True)
    assert [(below / name).read_text() for name in ("samples.json", "data/train.jsonl")] == ["mine", "mine"]


def test_a_digest_is_of_the_values() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_a_comparison_that_fails_costs_nothing_but_itself(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    real, recipe = house.work, house.recipe("evaluation.compare=[loftq, lora16]")

    def work(folder: RunFolder, stage: Stage) -> None:
        if stage.part == "loftq":
            raise StageFailed("loftq failed", 1)
        real(folder, stage)

    monkeypatch.setattr(job, "work", work)
    with pytest.raises(StageFailed, match="loftq failed; all else is there, and --resume tries it again"):
        job.train(recipe)
    assert house.told == {"full", "zeros_start", "zeros", "loftq_start", "lora16", "export"}
    monkeypatch.setattr(job, "work", real)
    house.done.clear()
    job.train(recipe, resume=True)
    assert house.done[0] == "loftq" and "loftq" in house.told


def test_one_place_names_every_file() -> None:
    """What another part spells itself would be missed when a folder is set aside, cleared or shown."""
    names, root = {*runfolder.WHOLE, *runfolder.OF_RUN}, Path(runfolder.__file__).parent
    own = {Path(runfolder.__file__), root / "store.py", root / "cli" / "init.py"}  # a saved model has a plan of its own, a person a recipe
    others = (Path(__file__).parents[1] / "benchmarks").rglob("*.py")
    spelled = {
        f"{file.name}, line {node.lineno}: {node.value}"
        for file in {*root.rglob("*.py"), *others} - own
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert spelled == set()
